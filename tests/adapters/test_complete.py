"""What adapter_config.json asks for and the tensors lack is an error; a complete adapter is summed up in a line.

That LoRA of every family is checked is in tests/families/test_ledger.py; here are the other kinds of tensors.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tests.families.adapters import PLAN, TENSORS, with_octavo, with_peft
from tests.families.models import Family, logits, write_family

from octavo.adapters import AdapterPlan, apply_, attached, attached_text, collect, create_, restore_
from octavo.errors import AdapterError
from octavo.store.peft import read

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning"),  # peft 0.21
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return write_family("llama", tmp_path_factory.mktemp("complete") / "llama")


def without(folder: Path, removed: str) -> None:
    """Removes the tensors whose names contain `removed` from an adapter."""
    tensors = load_file(folder / TENSORS)
    kept = {key: tensor for key, tensor in tensors.items() if removed not in key}
    assert len(kept) < len(tensors)
    save_file(kept, folder / TENSORS)


PARTS: dict[str, tuple[dict[str, Any], str, str]] = {
    "a norm": (
        {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm"]},
        "layers.1.input_layernorm",
        r"selects: model\.layers\.1\.input_layernorm\.weight\.",
    ),
    "a head": (
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
        "lm_head",
        r"selects: lm_head\.weight\.",
    ),
    "a bias in full": (
        {"target_modules": ["v_proj"], "modules_to_save": ["o_proj"]},
        "layers.0.self_attn.o_proj.bias",
        r"selects: model\.layers\.0\.self_attn\.o_proj\.bias\.",
    ),
    "a bias": (
        {"target_modules": ["q_proj", "o_proj"], "bias": "lora_only"},
        "layers.0.self_attn.o_proj.base_layer.bias",
        r"selects: model\.layers\.0\.self_attn\.o_proj\.bias\.",
    ),
    "a bias of all": (
        {"target_modules": ["q_proj"], "bias": "all"},
        "layers.1.self_attn.v_proj.bias",
        r"selects: model\.layers\.1\.self_attn\.v_proj\.bias\.",
    ),
    "trained tokens": (
        {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]},
        "token_adapter",
        r"selects: the trained tokens of model\.embed_tokens\.",
    ),
    "lora of an embedding": (
        {"target_modules": ["q_proj", "embed_tokens"]},
        "lora_embedding_",
        r"selects: model\.embed_tokens\.",
    ),
    "lora of two layers": (
        {"target_modules": r".*\.(q|up)_proj"},
        "up_proj",
        r"selects: model\.layers\.0\.mlp\.up_proj, model\.layers\.1\.mlp\.up_proj\.",
    ),
}


@pytest.mark.parametrize("case", PARTS)
def test_a_tensor_that_the_config_asks_for_must_be_there(case: str, llama: Family, tmp_path: Path) -> None:
    options, removed, reason = PARTS[case]
    expected = logits(with_peft(llama, tmp_path / "adapter", **options))
    model = llama.ours()
    apply_(model, read(tmp_path / "adapter"))
    assert (logits(model) - expected).abs().max() < 1e-4
    without(tmp_path / "adapter", removed)
    with pytest.raises(AdapterError, match=f"lack what adapter_config.json {reason}"):
        apply_(llama.ours(), read(tmp_path / "adapter"))


def test_a_model_without_all_linears_is_complete_without_the_head(llama: Family, tmp_path: Path) -> None:
    with_peft(llama, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "target_modules": "all-linear"}))
    apply_(llama.ours(), read(tmp_path / "adapter"))
    without(tmp_path / "adapter", "layers.1.mlp.down_proj")
    with pytest.raises(AdapterError, match=r"selects: model\.layers\.1\.mlp\.down_proj\."):
        apply_(llama.ours(), read(tmp_path / "adapter"))


def test_lora_of_the_other_kind_of_module_is_refused(llama: Family, tmp_path: Path) -> None:
    with_peft(llama, tmp_path / "adapter", target_modules=["q_proj", "embed_tokens"])
    tensors = load_file(tmp_path / "adapter" / TENSORS)
    renamed = {key.replace("lora_embedding_A", "lora_A.weight").replace("lora_embedding_B", "lora_B.weight"): tensor
               for key, tensor in tensors.items()}  # fmt: skip
    save_file(renamed, tmp_path / "adapter" / TENSORS)
    with pytest.raises(AdapterError, match=r"does not select: model\.embed_tokens\."):
        apply_(llama.ours(), read(tmp_path / "adapter"))


def test_a_selection_that_takes_too_long_is_an_adapter_error(llama: Family, tmp_path: Path) -> None:
    with_peft(llama, tmp_path / "adapter", target_modules=["q_proj"])
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "target_modules": "((.?){900}){900}x"}))
    with pytest.raises(AdapterError, match="takes too long") as caught:
        apply_(llama.ours(), read(tmp_path / "adapter"))
    assert "a list in place" in caught.value.hint


def test_tensors_of_the_vision_part_are_named(tmp_path: Path) -> None:
    family = write_family("gemma3", tmp_path / "gemma3")
    with_peft(family, tmp_path / "adapter", exclude_modules=None, target_modules=["q_proj"])
    with pytest.raises(
        AdapterError, match=r"outside the text part of the model: model\.vision_tower\.\S+q_proj"
    ) as caught:
        apply_(family.ours(), read(tmp_path / "adapter"))
    assert "exclude_modules" in caught.value.hint


def test_a_checkpoint_with_lora_on_a_module_that_is_not_trained_is_not_restored(llama: Family) -> None:
    whole, part = llama.ours(), llama.ours()
    create_(whole, PLAN, seed=0)
    create_(part, AdapterPlan(PLAN.spec, ("q_proj", "v_proj")), seed=0)
    with pytest.raises(AdapterError, match=r"not trained: model\.layers\.0\.self_attn\.k_proj, .* and \d+ more"):
        restore_(part, collect(whole, PLAN.spec))


def test_the_attached_modules_are_counted_by_their_last_names(llama: Family, tmp_path: Path) -> None:
    with_octavo(llama, tmp_path / "one", AdapterPlan(PLAN.spec, ("v_proj", "model.layers.1.mlp.up_proj")))
    one = read(tmp_path / "one")
    assert attached(one) == {"up_proj": 1, "v_proj": 2}
    assert attached_text(one) == "The adapter has LoRA on 3 modules of 2 layers: up_proj, v_proj."
    with_octavo(llama, tmp_path / "two", AdapterPlan(PLAN.spec, ("lm_head",), norms=True))
    assert attached_text(read(tmp_path / "two")) == (
        "The adapter has LoRA on 1 module: lm_head; it sets 5 norms, biases or full weights."
    )
