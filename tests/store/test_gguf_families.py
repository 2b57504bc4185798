"""GGUF files of families with other blocks than Llama's: tensors, config and logits equal those of the original.

The files are written as llama.cpp's converter writes them: names by the `gguf` package's own map, 1 added to the norms
of Gemma, rows of q and k permuted where the converter derives from LlamaModel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers

from octavo.errors import ModelError
from octavo.models import parse
from octavo.ops.quantize import scheme_named
from octavo.store.gguf import GgufSource, open_gguf
from octavo.store.weights import load

TOKENS = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "b", "ab"]
KINDS = [3, 3, 3, 2, *[6] * 256, 1, 1, 1, 1]
LAYERS, HEADS, KV_HEADS, HEAD_DIM = 7, 4, 2, 16
SIZES: dict[str, Any] = {
    "vocab_size": len(TOKENS), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 256, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
}
GRANITE = {"embedding_multiplier": 12.0, "residual_multiplier": 0.25, "attention_multiplier": 0.125}
# GGUF architecture -> (class, its config, the metadata that the converter writes of it)
FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "gemma3": (
        "Gemma3ForCausalLM",
        {"query_pre_attn_scalar": HEAD_DIM, "sliding_window": 8, "rope_parameters": GEMMA3_ROPE},
        {
            "rope.freq_base": 1e6, "rope.scaling.type": "linear", "rope.scaling.factor": 8.0,
            "attention.sliding_window": 8,
        },
    ),
    "gemma2": (
        "Gemma2ForCausalLM",
        {"query_pre_attn_scalar": HEAD_DIM, "sliding_window": 8, "final_logit_softcapping": 20.0},
        {"attention.sliding_window": 8, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 20.0},
    ),
    "qwen3": ("Qwen3ForCausalLM", {"rope_theta": 1e6, "tie_word_embeddings": True}, {"rope.freq_base": 1e6}),
    "olmo2": ("Olmo2ForCausalLM", {"rope_theta": 5e5}, {"rope.freq_base": 5e5}),
    "granite": (
        "GraniteForCausalLM",
        {**GRANITE, "logits_scaling": 4.0, "rope_theta": 5e4, "tie_word_embeddings": True},
        {
            "rope.freq_base": 5e4, "embedding_scale": 12.0, "residual_scale": 0.25, "attention.scale": 0.125,
            "logit_scale": 4.0,
        },
    ),
    "smollm3": ("SmolLM3ForCausalLM", {"rope_theta": 2e6, "tie_word_embeddings": True}, {"rope.freq_base": 2e6}),
}  # fmt: skip
PERMUTED = ("granite", "smollm3")


def tiny_model(architecture: str, **changes: Any) -> Any:
    """A random model whose parameters have bfloat16 values, as published ones do."""
    torch.manual_seed(3)
    name, settings, _ = FAMILIES[architecture]
    model_class = getattr(transformers, name)
    sizes = {**SIZES, "head_dim": 8} if architecture in ("granite", "smollm3", "olmo2") else SIZES
    config = model_class.config_class(**{**sizes, **settings, **changes}, attn_implementation="eager")
    model = model_class(config).eval()  # eager attention is the only one that soft-caps scores
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn_like(parameter).mul(0.3).bfloat16())
    return model


def stored(model: Any, architecture: str) -> dict[str, np.ndarray]:
    """The tensors of `model` as convert_hf_to_gguf.py writes them."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], LAYERS)
    arrays = {}
    for name, values in model.named_parameters():
        rows = values.detach().numpy()
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            rows = rows + np.float32(1)
        for part, heads in ((".q_proj.", HEADS), (".k_proj.", KV_HEADS)):
            if part in name and architecture in PERMUTED:
                split = rows.reshape(heads, 2, rows.shape[0] // heads // 2, -1)
                rows = split.swapaxes(1, 2).reshape(rows.shape)
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert found is not None, name
        arrays[found] = np.ascontiguousarray(rows)
    return arrays


def write(
    path: Path,
    architecture: str,
    arrays: Mapping[str, np.ndarray],
    *,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """A GGUF file; an entry of `metadata` that is None is left out."""
    writer = gguf.GGUFWriter(str(path), architecture)
    head_dim = arrays["blk.0.attn_k.weight"].shape[0] // KV_HEADS
    entries = {
        "block_count": LAYERS, "context_length": 256, "embedding_length": 32, "feed_forward_length": 48,
        "attention.head_count": HEADS, "attention.head_count_kv": KV_HEADS, "attention.key_length": head_dim,
        "attention.value_length": head_dim, "attention.layer_norm_rms_epsilon": 1e-5,
        **FAMILIES[architecture][2], **(metadata or {}),
    }  # fmt: skip
    add: dict[type, Callable[[str, Any], None]] = {
        int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array,
        bool: writer.add_bool,
    }  # fmt: skip
    for key, value in entries.items():
        if value is not None:
            add[type(value)](f"{architecture}.{key}", value)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(TOKENS)
    writer.add_token_scores([-float(number) for number in range(len(TOKENS))])
    writer.add_token_types(KINDS)
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(0)
    writer.add_add_space_prefix(False)
    for name, values in arrays.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def written(path: Path, architecture: str, model: Any = None, **metadata: Any) -> GgufSource:
    model = model or tiny_model(architecture)
    return open_gguf(write(path, architecture, stored(model, architecture), metadata=metadata))


@pytest.mark.parametrize("architecture", FAMILIES)
def test_tensors_and_logits_equal_those_of_the_original(architecture: str, tmp_path: Path) -> None:
    theirs = tiny_model(architecture)
    source = written(tmp_path / "m.gguf", architecture, theirs)
    expected = dict(theirs.named_parameters())
    assert set(source.names()) == set(expected)
    for name in source.names():
        assert torch.equal(source.tensor(name), expected[name].detach()), name
    assert parse(source.config) == parse(theirs.config.to_dict())
    ours = load(source, scheme_named("none"), dtype=torch.float32, device=torch.device("cpu"))
    ids = torch.arange(2 * 24).reshape(2, 24) + 200
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_the_config_makes_the_same_model_in_transformers(architecture: str, tmp_path: Path) -> None:
    theirs = tiny_model(architecture)
    source = written(tmp_path / "m.gguf", architecture, theirs)
    again = type(theirs)(type(theirs.config)(**source.config, attn_implementation="eager")).eval()
    again.load_state_dict({name: source.tensor(name) for name in source.names()}, strict=False)
    ids = torch.arange(24)[None] + 200
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, theirs(ids).logits, rtol=0, atol=0)


@pytest.mark.parametrize("architecture", ["gemma3", "gemma2", "qwen3"])
def test_tensors_equal_those_of_transformers_own_reader(architecture: str, tmp_path: Path) -> None:
    source = written(tmp_path / "m.gguf", architecture)
    theirs = getattr(transformers, FAMILIES[architecture][0]).from_pretrained(tmp_path, gguf_file="m.gguf")
    for name, values in theirs.named_parameters():
        assert torch.equal(source.tensor(name), values.detach()), name


def test_a_norm_of_gemma_times_its_input_keeps_its_bits(tmp_path: Path) -> None:
    """From 1/2 on 1 + w has the bits of the file; below, subtracting 1 may round."""
    arrays = stored(tiny_model("gemma3"), "gemma3")
    values = np.array([0.0, 1e-30, 2**-24, 0.1, 0.4999, 0.5, 1.0, 1 + 2**-23, 1.7, 3.3, 57.123, -0.3], np.float32)
    arrays["output_norm.weight"] = np.resize(values, 32)
    source = open_gguf(write(tmp_path / "m.gguf", "gemma3", arrays))
    weight = source.tensor("model.norm.weight")
    kept = values >= 0.5
    assert torch.equal((1 + weight)[:12][torch.from_numpy(kept)], torch.from_numpy(values[kept]))
    assert (1 + weight[:12] - torch.from_numpy(values)).abs().max() <= 2**-24


def test_a_gemma3_of_62_layers_scales_scores_by_width_over_heads(tmp_path: Path) -> None:
    model = tiny_model("gemma3", num_hidden_layers=2)
    arrays = stored(model, "gemma3")
    block = {name: values for name, values in arrays.items() if name.startswith("blk.1.")}
    for layer in range(2, 62):
        arrays |= {name.replace("blk.1.", f"blk.{layer}."): values for name, values in block.items()}
    source = open_gguf(write(tmp_path / "m.gguf", "gemma3", arrays, metadata={"block_count": 62}))
    assert source.config["query_pre_attn_scalar"] == 32 // HEADS


PATTERNS: dict[str, tuple[dict[str, Any], list[int]]] = {
    "llama.cpp's": ({}, [5]),
    "another": ({"attention.sliding_window_pattern": 3}, [2, 5]),
    "each layer": ({"attention.sliding_window_pattern": [True, False, True, True, True, True, False]}, [1, 6]),
    "no window": ({"attention.sliding_window": None}, [0, 1, 2, 3, 4, 5, 6]),
}


@pytest.mark.parametrize("case", PATTERNS)
def test_the_layers_without_a_window(case: str, tmp_path: Path) -> None:
    metadata, full = PATTERNS[case]
    source = written(tmp_path / "m.gguf", "gemma3", **metadata)
    layers = parse(source.config).attention
    assert [i for i, layer in enumerate(layers) if layer.spec.window is None] == full
    assert {layer.spec.window for layer in layers} <= {None, 8}


def test_a_base_for_layers_with_a_window_is_read(tmp_path: Path) -> None:
    source = written(tmp_path / "m.gguf", "gemma3", **{"rope.freq_base_swa": 5000.0})
    assert source.config["rope_parameters"]["sliding_attention"] == {"rope_type": "default", "rope_theta": 5000.0}


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "a pattern of nothing": ("gemma3", {"attention.sliding_window_pattern": 0}, "sliding_window_pattern"),
    "a pattern of other layers": ("gemma3", {"attention.sliding_window_pattern": [True]}, "sliding_window_pattern"),
    "a window of text": ("gemma3", {"attention.sliding_window": "8"}, "sliding_window is '8'"),
    "both directions": ("gemma3", {"attention.causal": False}, "attention.causal"),
    "soft-capped scores": ("gemma3", {"attn_logit_softcapping": 50.0}, "soft-capped"),
    "yarn": ("qwen3", {"rope.scaling.type": "yarn"}, "yarn"),
    "OLMo 3": ("olmo2", {"attention.sliding_window": 8}, "OLMo 3"),
    "experts": ("granite", {"expert_count": 4}, "experts"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_the_error_of_an_unsupported_feature_names_it(case: str, tmp_path: Path) -> None:
    architecture, metadata, named = REFUSED[case]
    with pytest.raises(ModelError, match=named):
        written(tmp_path / "m.gguf", architecture, **metadata)


@pytest.mark.parametrize("architecture", ["gemma", "gemma3n", "gemma4", "gemma-embedding", "qwen3moe", "lfm2"])
def test_other_architectures_are_refused_before_their_tensors_are_looked_at(architecture: str, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(str(tmp_path / "m.gguf"), architecture)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match=rf"architecture '{architecture}'; it supports llama, .*gemma3"):
        open_gguf(tmp_path / "m.gguf")
