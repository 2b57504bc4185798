"""Adapters on a model: the same logits here and in peft, in both directions; others are refused."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from octavo.adapters import AdapterPlan, apply_, collect, copied, create_, restore_, save, select, trained
from octavo.errors import AdapterError
from octavo.layers.lora import LoraSpec, flatten_
from octavo.models import Decoder
from octavo.ops.quantize import scheme_named
from octavo.store.peft import Adapter, read, tensors_of
from octavo.store.sources import FolderSource
from octavo.store.weights import load

pytestmark = [
    # peft 0.21 and the torch that it calls.
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
]

IDS = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(0))
# Of float32 logits of about 7. The float32 logits of transformers differ from its float64 ones by up to 1.1e-4 here
# ("rslora"), ours by as much, and so both from each other by up to twice that. An error changes them by 0.1 and more.
TOLERANCE = 3e-4
SPEC = LoraSpec(rank=4, alpha=12.0)

PLANS: dict[str, tuple[str, AdapterPlan]] = {
    "llama": ("llama", AdapterPlan(SPEC)),
    "some names": ("llama", AdapterPlan(SPEC, ("q_proj", "down_proj"))),
    "one layer": ("llama", AdapterPlan(SPEC, ("model.layers.1.mlp.up_proj", "v_proj"))),
    "ends": ("llama", AdapterPlan(SPEC, ("all-linear", "lm_head", "embed_tokens"))),
    "rslora": ("llama", AdapterPlan(replace(SPEC, rslora=True))),
    "norms": ("llama", AdapterPlan(SPEC, norms=True)),
    "biases": ("llama", AdapterPlan(SPEC, biases=True)),
    "tied": ("llama-tied", AdapterPlan(SPEC, norms=True)),
    "tied ends": ("llama-tied", AdapterPlan(SPEC, ("q_proj", "lm_head", "embed_tokens"))),
    "qwen3 norms": ("qwen3", AdapterPlan(SPEC, norms=True)),
    "smollm3 tied ends": ("smollm3", AdapterPlan(SPEC, ("all-linear", "embed_tokens", "lm_head"))),
    "olmo2 norms": ("olmo2", AdapterPlan(SPEC, norms=True)),
    "gemma2 tied ends, norms": ("gemma2", AdapterPlan(SPEC, ("all-linear", "embed_tokens"), norms=True)),
    "gemma3 norms": ("gemma3", AdapterPlan(SPEC, norms=True)),
    "neox norms and biases": ("neox", AdapterPlan(SPEC, norms=True, biases=True)),
    "neox ends": ("neox", AdapterPlan(SPEC, ("all-linear", "lm_head", "embed_in"))),
    "neox tied ends": ("neox-tied", AdapterPlan(SPEC, ("query_key_value", "embed_out", "embed_in"))),
    "gpt2": ("gpt2", AdapterPlan(SPEC)),
    "gpt2 ends": ("gpt2", AdapterPlan(SPEC, ("c_attn", "transformer.h.1.mlp.c_proj", "wte", "lm_head"))),
    "gpt2 norms, positions and biases": ("gpt2", AdapterPlan(SPEC, norms=True, biases=True)),
    "gpt_neo norms, positions and biases": ("gpt_neo", AdapterPlan(SPEC, norms=True, biases=True)),
    "gpt_neo tied ends": ("gpt_neo", AdapterPlan(SPEC, ("all-linear", "wte", "lm_head"))),
    "gptj": ("gptj", AdapterPlan(SPEC)),
    "gptj ends": ("gptj", AdapterPlan(SPEC, ("all-linear", "lm_head", "wte"))),
    "gptj norms and biases": ("gptj", AdapterPlan(SPEC, norms=True, biases=True)),
    "gptj biases where there are some": ("gptj", AdapterPlan(SPEC, ("q_proj", "fc_in"), biases=True)),
    "gptj biases where there are none": ("gptj", AdapterPlan(SPEC, ("q_proj", "v_proj"), biases=True)),
    "gptj head with bias": ("gptj", AdapterPlan(SPEC, ("q_proj", "lm_head"), biases=True)),
}
LLAMA_LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PATTERNS = {
    "rank_pattern": {"q_proj": 7, "layers.1.mlp.up_proj": 2},
    "alpha_pattern": {
        "down_proj": 40,
        "model.layers.0.self_attn.v_proj": 3,
        "layers.1.self_attn.k_proj|o_proj": 9,
    },
}
PEFTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"target_modules": "all-linear"}),
    "some names": ("llama", {"target_modules": ["k_proj", "gate_proj"], "lora_dropout": 0.1}),
    "ends": ("llama", {"target_modules": ["q_proj", "lm_head", "embed_tokens"]}),
    "rslora": ("llama", {"target_modules": "all-linear", "use_rslora": True}),
    "patterns": ("llama", {"target_modules": LLAMA_LINEARS, **PATTERNS}),
    "rslora patterns": ("llama", {"target_modules": LLAMA_LINEARS, "use_rslora": True, **PATTERNS}),
    "norms": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm", "model.norm"]}),
    "biases": ("llama", {"target_modules": LLAMA_LINEARS, "bias": "lora_only"}),
    "one layer": ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "tied": ("llama-tied", {"target_modules": "all-linear"}),
    "qwen3": ("qwen3", {"target_modules": "all-linear", "modules_to_save": ["q_norm"]}),
    "smollm3": ("smollm3", {"target_modules": "all-linear"}),
    "olmo2": ("olmo2", {"target_modules": "all-linear", "modules_to_save": ["k_norm", "post_feedforward_layernorm"]}),
    "gemma2": ("gemma2", {"target_modules": "all-linear", "modules_to_save": ["pre_feedforward_layernorm"]}),
    "gemma3": ("gemma3", {"target_modules": "all-linear", "modules_to_save": ["k_norm", "post_feedforward_layernorm"]}),
    "neox": ("neox", {"target_modules": "all-linear"}),
    "neox biases": ("neox", {"target_modules": ["query_key_value", "dense"], "bias": "lora_only"}),
    "neox ends": ("neox", {"target_modules": ["query_key_value", "lm_head", "embed_in"]}),
    "neox head in full": ("neox", {"target_modules": ["dense"], "modules_to_save": ["lm_head", "embed_in"]}),
    "gpt2": ("gpt2", {"target_modules": "all-linear"}),
    "gpt2 some": ("gpt2", {"target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True, "bias": "lora_only"}),
    "gpt2 default": ("gpt2", {}),
    "gpt2 in full": ("gpt2", {"target_modules": ["c_attn"], "modules_to_save": ["c_fc", "wpe"]}),
    "gpt_neo": ("gpt_neo", {"target_modules": "all-linear"}),
    "gpt_neo positions": ("gpt_neo", {"target_modules": ["q_proj", "c_fc"], "modules_to_save": ["wpe", "ln_f"]}),
    "gptj": ("gptj", {"target_modules": "all-linear"}),
    "gptj default": ("gptj", {}),
    "gptj ends": ("gptj", {"target_modules": ["fc_in", "lm_head", "wte"]}),
    "gptj biases": ("gptj", {"target_modules": ["q_proj", "fc_in", "fc_out"], "bias": "lora_only"}),
    "gptj norms": ("gptj", {"target_modules": ["out_proj"], "modules_to_save": ["ln_1", "ln_f"]}),
}


def transformers_model(folder: Path) -> Any:
    """The model in transformers, whose other attentions ignore a soft-cap of the scores."""
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")


def model_of(folder: Path) -> Decoder:
    return load(FolderSource(folder), scheme_named("none"), dtype=torch.float32, device=torch.device("cpu"))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        actual = model(IDS)
    return actual if isinstance(actual, Tensor) else actual.logits


def shake_(parameters: Iterator[torch.nn.Parameter]) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in parameters:
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)


def tuned(folder: Path, plan: AdapterPlan) -> Decoder:
    """A model with an adapter on it, whose weights are no longer those of the start."""
    model = model_of(folder)
    create_(model, plan, seed=0)
    shake_(iter(trained(model).values()))
    return model


def write(out: Path, model: Decoder, plan: AdapterPlan, base: str = "base") -> None:
    save(out, model, plan, base=base, origin={"base": "hash"}, readme="# A model\n")


def peft_adapter(folder: Path, out: Path, options: dict[str, Any]) -> Any:
    """Writes an adapter with peft into `out`; returns its model."""
    torch.manual_seed(0)
    base = transformers_model(folder)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "lora_alpha": 12, **options}))
    shake_(parameter for parameter in model.parameters() if parameter.requires_grad)
    model.save_pretrained(out)
    return model.eval()


@pytest.mark.parametrize("case", PLANS)
def test_an_adapter_of_octavos_gives_the_same_logits_in_peft(
    case: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    family, plan = PLANS[case]
    model = tuned(folders[family], plan)
    write(tmp_path / "adapter", model, plan, str(folders[family]))
    base = transformers_model(folders[family])
    untouched = logits(base)
    theirs = logits(PeftModel.from_pretrained(base, tmp_path / "adapter"))
    assert (theirs - untouched).abs().max() > 0.1
    assert (theirs - logits(model)).abs().max() <= TOLERANCE


@pytest.mark.parametrize("case", PEFTS)
def test_an_adapter_of_pefts_gives_the_same_logits_here(case: str, folders: dict[str, Path], tmp_path: Path) -> None:
    family, options = PEFTS[case]
    theirs = logits(peft_adapter(folders[family], tmp_path / "adapter", options))
    model = model_of(folders[family])
    untouched = logits(model)
    apply_(model, read(tmp_path / "adapter"))
    assert (theirs - untouched).abs().max() > 0.1
    assert (theirs - logits(model)).abs().max() <= TOLERANCE


@pytest.mark.filterwarnings("error:fan_in_fan_out is set to:UserWarning")
@pytest.mark.parametrize("case", ["gpt2", "gpt_neo norms, positions and biases"])
def test_peft_merges_an_adapter_into_weights_as_the_base_stores_them(
    case: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    family, plan = PLANS[case]
    model = tuned(folders[family], plan)
    write(tmp_path / "adapter", model, plan)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] is (family == "gpt2")
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folders[family]), tmp_path / "adapter")
    assert (logits(theirs.merge_and_unload()) - logits(model)).abs().max() <= TOLERANCE


@pytest.mark.parametrize("case", PEFTS)
def test_an_adapter_of_pefts_saved_here_gives_the_same_logits_in_peft(
    case: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    family, options = PEFTS[case]
    expected = logits(peft_adapter(folders[family], tmp_path / "theirs", options))
    model = model_of(folders[family])
    plan = apply_(model, read(tmp_path / "theirs"))
    write(tmp_path / "ours", model, plan)
    base = transformers_model(folders[family])
    actual = logits(PeftModel.from_pretrained(base, tmp_path / "ours"))
    assert (actual - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize("case", PLANS)
def test_an_adapter_read_back_is_the_same_and_can_be_trained_further(
    case: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    family, plan = PLANS[case]
    model = tuned(folders[family], plan)
    write(tmp_path / "adapter", model, plan)
    again = model_of(folders[family])
    apply_(again, read(tmp_path / "adapter"))
    assert torch.equal(logits(again), logits(model))
    expected, actual = trained(model), trained(again)
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize("case", PLANS)
def test_a_saved_adapter_is_restored_bit_for_bit_into_flat_buffers(
    case: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    family, plan = PLANS[case]
    model, other = tuned(folders[family], plan), model_of(folders[family])
    create_(other, plan, seed=7)
    write(tmp_path / "adapter", model, plan)
    groups = flatten_(trained(other))
    addresses = {name: parameter.data_ptr() for name, parameter in trained(other).items()}
    restore_(other, read(tmp_path / "adapter"))
    assert {name: parameter.data_ptr() for name, parameter in trained(other).items()} == addresses
    assert trained(other).keys() == trained(model).keys()
    for name, parameter in trained(model).items():
        assert torch.equal(trained(other)[name], parameter), name
    for group in groups:
        values = torch.cat([trained(model)[name].reshape(-1) for name in group.names])
        assert torch.equal(group.values, values)


@pytest.mark.parametrize("case", ["norms", "biases", "neox norms and biases"])
def test_an_adapter_that_lacks_a_trained_tensor_is_not_restored(case: str, folders: dict[str, Path]) -> None:
    family, plan = PLANS[case]
    model = tuned(folders[family], plan)
    whole = copied(collect(model, plan.spec))
    key = next(iter(whole.full))
    tensor = whole.full[key]
    missing = replace(whole, full={name: value for name, value in whole.full.items() if name != key})
    for adapter in (missing, replace(whole, full={**whole.full, key: tensor[1:]})):
        with pytest.raises(AdapterError, match=rf"no {key} of shape \({len(tensor)},\)"):
            restore_(model, adapter)


def test_a_copy_does_not_change_with_the_model(folders: dict[str, Path]) -> None:
    family, plan = PLANS["norms"]
    model = tuned(folders[family], plan)
    copy, before = copied(collect(model, plan.spec)), tensors_of(collect(model, plan.spec))
    shake_(iter(trained(model).values()))
    assert {name: torch.equal(tensor, before[name]) for name, tensor in tensors_of(copy).items()} == dict.fromkeys(
        before, True
    )


@pytest.mark.parametrize("case", PLANS)
def test_a_new_adapter_changes_no_logits_and_depends_only_on_its_seed(case: str, folders: dict[str, Path]) -> None:
    family, plan = PLANS[case]
    models = [model_of(folders[family]) for _ in range(3)]
    untouched = logits(models[0])
    for model, seed in zip(models, (1, 1, 2), strict=True):
        create_(model, plan, seed=seed)
        # LoRA adds zeros, but the sums of a GEMM with LoRA may be taken in another order.
        assert (logits(model) - untouched).abs().max() <= 1e-5
    first, same, other = (tensors_of(collect(model, plan.spec)) for model in models)
    assert all(torch.equal(first[name], same[name]) for name in first)
    drawn = [name for name in first if name.endswith(("lora_A.weight", "lora_embedding_B"))]
    assert drawn
    assert not any(torch.equal(first[name], other[name]) for name in drawn)


@pytest.mark.parametrize(
    ("family", "targets"),
    [("llama", "all-linear"), ("gptj", "all-linear"), ("neox", ["query_key_value", "lm_head"])],
)
def test_a_saved_file_has_the_names_and_shapes_of_pefts_own(
    family: str, targets: str | list[str], folders: dict[str, Path], tmp_path: Path
) -> None:
    plan = AdapterPlan(SPEC, (targets,) if isinstance(targets, str) else tuple(targets))
    write(tmp_path / "ours", tuned(folders[family], plan), plan)
    options = {"target_modules": targets}
    model = peft_adapter(folders[family], tmp_path / "theirs", options)
    model.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    assert {n: (t.shape, t.dtype) for n, t in ours.items()} == {n: (t.shape, t.dtype) for n, t in theirs.items()}


def test_a_head_of_gpt_neox_is_read_under_the_name_of_its_checkpoint_too(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """transformers 4 calls the module embed_out, as the checkpoint does."""
    expected = logits(peft_adapter(folders["neox"], tmp_path / "adapter", {"target_modules": ["dense", "lm_head"]}))
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name.replace("lm_head", "embed_out"): t for name, t in load_file(file).items()}, file)
    model = model_of(folders["neox"])
    apply_(model, read(tmp_path / "adapter"))
    assert (logits(model) - expected).abs().max() <= TOLERANCE
    assert "embed_out.lora_A" in trained(model)


def test_targets_are_selected_in_the_models_order(folders: dict[str, Path]) -> None:
    model = model_of(folders["llama"])
    names = [entry.name for entry in select(model, ["down_proj", "q_proj", "model.layers.0.self_attn.q_proj"])]
    assert names == [f"model.layers.{i}.{name}" for i in (0, 1) for name in ("self_attn.q_proj", "mlp.down_proj")]
    every = {entry.key for entry in select(model, ["all-linear"])}
    assert every == set(LLAMA_LINEARS)


@pytest.mark.parametrize(("target", "near"), [("q_prj", "q_proj"), ("lmhead", "lm_head"), ("xyzzy", None)])
def test_the_error_of_an_unknown_target_suggests_the_most_similar_one(
    target: str, near: str | None, folders: dict[str, Path]
) -> None:
    with pytest.raises(AdapterError, match=target) as caught:
        select(model_of(folders["llama"]), ["q_proj", target])
    assert (f"Did you mean {near}?" in caught.value.hint) is (near is not None)
    assert "embed_tokens" in caught.value.hint


def test_biases_that_share_a_matrix_are_trained_together_or_not_at_all(folders: dict[str, Path]) -> None:
    with pytest.raises(AdapterError, match="stored with those of k_proj, v_proj"):
        create_(model_of(folders["llama"]), AdapterPlan(SPEC, ("q_proj",), biases=True), seed=0)


def test_a_dora_adapter_of_peft_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    peft_adapter(folders["llama"], tmp_path / "adapter", {"target_modules": ["q_proj"], "use_dora": True})
    with pytest.raises(AdapterError, match="use_dora"):
        read(tmp_path / "adapter")


def test_trained_norms_and_biases_have_pefts_names(folders: dict[str, Path], tmp_path: Path) -> None:
    plan = AdapterPlan(SPEC, norms=True, biases=True)
    write(tmp_path / "adapter", tuned(folders["gptj"], plan), plan)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["transformer.h.0.ln_1", "transformer.h.1.ln_1", "transformer.ln_f"]
    assert config["bias"] == "lora_only"


def test_an_adapter_of_another_model_is_refused_by_names_and_by_shapes(folders: dict[str, Path]) -> None:
    def adapter(name: str, **changes: Any) -> Adapter:
        lora = {name: (torch.ones(4, 64), torch.ones(64, 4), 1.0)}
        return Adapter(SPEC, changes.get("lora", lora), changes.get("full", {}))

    for name in ("transformer.h.0.attn.q_proj", "model.layers.2.self_attn.q_proj", "model.norm"):
        with pytest.raises(AdapterError, match="no module for " + name):
            apply_(model_of(folders["llama"]), adapter(name))
    for key in ("model.layers.0.ln_1.weight", "model.norm.bias", "lm_head.bias", "score.weight"):
        with pytest.raises(AdapterError, match="no module for " + key):
            apply_(model_of(folders["llama"]), adapter("", lora={}, full={key: torch.ones(64)}))
    for name in ("model.layers.0.self_attn.k_proj", "model.embed_tokens", "lm_head"):
        with pytest.raises(AdapterError, match=rf"LoRA matrix {re.escape(name)}\.lora_[AB] is \(.*\), not \("):
            apply_(model_of(folders["llama"]), adapter(name))
    for shape in ((64,), (300, 63), (0, 64)):
        with pytest.raises(AdapterError, match=r"model\.embed_tokens\.weight is \("):
            apply_(
                model_of(folders["llama"]), adapter("", lora={}, full={"model.embed_tokens.weight": torch.ones(shape)})
            )
    with pytest.raises(AdapterError, match=r"model\.norm\.weight is \(63,\)"):
        apply_(model_of(folders["llama"]), adapter("", lora={}, full={"model.norm.weight": torch.ones(63)}))
