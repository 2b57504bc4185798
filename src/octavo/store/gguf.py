"""A GGUF file as a source of weights: Hugging Face names and row order, one tensor in memory at a time.

GGUF is llama.cpp's format: one file, or several parts, hold the metadata, the tokenizer and block-quantised tensors.
Read here are the architectures `llama` (Llama 2 and 3, SmolLM2, Mistral) and `qwen2`. What would change the model's
numbers in a way that octavo does not compute (other scaled rotary embeddings, experts) is refused by name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gguf.quants import dequantize

from octavo.bounded_json import shown
from octavo.errors import ModelError
from octavo.store.gguf_header import Header, TensorPlace
from octavo.store.gguf_rope import llama3_rope
from octavo.store.gguf_split import read_parts
from octavo.store.gguf_tokenizer import build_tokenizer
from octavo.store.gguf_vocabulary import ELSEWHERE, special_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}

# Hugging Face module -> GGUF module; a block's modules are prefixed by model.layers.N. and blk.N.
TOP_MODULES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
BLOCK_MODULES = {
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
ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True)
class GgufSource:
    """An opened GGUF file. `config` says what the config.json of the Hugging Face model would say."""

    config: dict[str, Any]
    files: list[Path]
    _header: Header = field(repr=False)
    _shapes: dict[str, tuple[int, ...]] = field(repr=False)

    @property
    def generation_config(self) -> dict[str, Any]:
        """Nothing beyond `config`: a GGUF file has no other place for it."""
        return {}

    def names(self) -> list[str]:
        """Hugging Face tensor names, in the order of the forward pass; a tied head has none of its own."""
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the tensor called `name`."""
        return self._shapes[name]

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor called `name` (one of `names()`), dequantised to float32, rows in Hugging Face order.

        Raises ModelError if the file has become shorter since it was opened.
        """
        place = self._header.tensors[_gguf_name(name)]
        values = _read(place, name)
        heads = self._permuted_heads(name)
        return _unpermute(values, heads) if heads else values

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The file's tokenizer. Raises ModelError if its kind is not known to be reproduced exactly."""
        return build_tokenizer(
            self._header.metadata,
            where=str(self._header.path),
            max_length=self.config["max_position_embeddings"],
        )

    def _permuted_heads(self, name: str) -> int:
        """How many heads llama.cpp's converter shuffled the rows of `name` in; 0 if it left them alone."""
        if self.config["model_type"] != "llama":
            return 0
        if ".q_proj." in name:
            return int(self.config["num_attention_heads"])
        return int(self.config["num_key_value_heads"]) if ".k_proj." in name else 0


def open_gguf(path: Path) -> GgufSource:
    """Open the GGUF file at `path`: reads and checks the header, no weights.

    Raises ModelError if the file is broken, of an architecture other than ARCHITECTURES, uses something that
    octavo does not compute, or has a tensor too many, too few or of another shape than its metadata says.
    """
    header, files = read_parts(path)
    config = _config(header)
    shapes = _shapes(config)
    _check_tensors(header, shapes)
    tokens = len(header.metadata["tokenizer.ggml.tokens"])
    if tokens > config["vocab_size"]:
        raise ModelError(f"{path}: {tokens:,} tokens, but the embedding has {config['vocab_size']:,} rows.")
    return GgufSource(config=config, files=files, _header=header, _shapes=shapes)


def _read(place: TensorPlace, name: str) -> torch.Tensor:
    """A tensor dequantised to float32, in the file's row order."""
    with place.path.open("rb") as file:
        file.seek(place.offset)
        raw = file.read(place.size_bytes)
    if len(raw) != place.size_bytes:
        raise ModelError(f"{place.path}: the file changed while it was read ({name} is cut short).")
    rows = np.frombuffer(raw, dtype=np.uint8).reshape(*place.shape[:-1], -1)
    # The copy makes the result own writable memory: unquantised types come back as a view of `raw`.
    return torch.from_numpy(np.array(dequantize(rows, place.kind), dtype=np.float32)).reshape(place.shape)


def _unpermute(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo llama.cpp's row order of q and k: it rotates the rows (0, 1), (2, 3), ... of a head as pairs,
    Hugging Face (0, d/2), (1, d/2 + 1), ...

    rows: (heads * head_dim, ...), a weight or a bias. Source: convert_hf_to_gguf.py, LlamaModel.permute.
    """
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape).contiguous()


def _gguf_name(name: str) -> str:
    module, _, suffix = name.rpartition(".")
    block = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module)
    return f"blk.{block[1]}.{BLOCK_MODULES[block[2]]}.{suffix}" if block else f"{TOP_MODULES[module]}.{suffix}"


def _config(header: Header) -> dict[str, Any]:
    """The metadata in the words of a Hugging Face config.json."""
    architecture = str(header.metadata.get("general.architecture"))
    if architecture not in ARCHITECTURES:
        raise ModelError(
            f"{header.path}: the GGUF architecture {architecture!r} is not supported; "
            f"{' and '.join(ARCHITECTURES)} are.",
            hint=ELSEWHERE,
        )
    _refuse_uncomputed(header, architecture)

    def size(key: str, default: int | None = None) -> int:
        return _size(header, f"{architecture}.{key}", default=default)

    hidden, heads = size("embedding_length"), size("attention.head_count")
    head_dim = size("attention.key_length", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if size(key, head_dim) != head_dim:
            raise ModelError(
                f"{header.path}: {architecture}.{key} is {size(key)}, but a head has {head_dim} dimensions.",
                hint="Such heads are not supported. " + ELSEWHERE,
            )
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None:
        raise ModelError(f"{header.path}: the tensor token_embd.weight is missing.", hint=ELSEWHERE)
    layers = size("block_count")
    if layers > len(header.tensors):
        raise ModelError(f"{header.path}: {layers:,} layers, but only {len(header.tensors)} tensors.", hint=ELSEWHERE)
    return {
        "architectures": [ARCHITECTURES[architecture]],
        "model_type": architecture,
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "intermediate_size": size("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": size("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": _decimal(header, f"{architecture}.attention.layer_norm_rms_epsilon"),
        **_rope(header, architecture, head_dim),
        # Within the window of sliding attention (Mistral 7B v0.1) it equals full attention.
        "max_position_embeddings": min(size("context_length"), _window(header, architecture)),
        **_options(header, architecture),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "dtype": "float32",
        **{f"{role}_token_id": number for role, number in special_ids(header.metadata, str(header.path)).items()},
    }


def _rope(header: Header, architecture: str, head_dim: int) -> dict[str, Any]:
    theta = _decimal(header, f"{architecture}.rope.freq_base", default=10_000.0)
    place = header.tensors.get(ROPE_FACTORS)
    if place is None:
        return {"rope_theta": theta}
    factors = _read(place, ROPE_FACTORS).flatten()
    return {"rope_parameters": llama3_rope(factors, theta=theta, head_size=head_dim, path=header.path)}


def _window(header: Header, architecture: str) -> int:
    """The positions that attention may see; the context if there is no window."""
    context = _size(header, f"{architecture}.context_length")
    window = header.metadata.get(f"{architecture}.attention.sliding_window") or context
    if type(window) is not int or window < 1:
        raise ModelError(f"{header.path}: {architecture}.attention.sliding_window is {shown(window)}.", hint=ELSEWHERE)
    return window


def _options(header: Header, architecture: str) -> dict[str, Any]:
    """The entries that only this architecture's config.json has."""
    if architecture == "qwen2":
        return {"use_sliding_window": False}
    biases = {"attention_bias": "attn_q", "mlp_bias": "ffn_gate"}
    return {key: f"blk.0.{module}.bias" in header.tensors for key, module in biases.items()}


def _refuse_uncomputed(header: Header, architecture: str) -> None:
    """Raise ModelError if the metadata asks for mathematics that octavo's model of this family lacks."""
    metadata = header.metadata
    scaling = metadata.get(f"{architecture}.rope.scaling.type", "none")
    factors = [metadata.get(f"{architecture}.rope.{key}", 1.0) for key in ("scaling.factor", "scale_linear")]
    found = ""
    if scaling != "none":
        found = f"rotary scaling ({architecture}.rope.scaling.type = {scaling!r})"
    elif any(factor not in (0.0, 1.0) for factor in factors):
        found = f"rotary scaling (factor {factors[0] if factors[0] not in (0.0, 1.0) else factors[1]})"
    elif metadata.get(f"{architecture}.expert_count", 0):
        found = f"a mixture of experts ({architecture}.expert_count)"
    if found:
        raise ModelError(f"{header.path}: the model uses {found}, which is not supported.", hint=ELSEWHERE)


def _size(header: Header, key: str, *, default: int | None = None) -> int:
    """A positive integer of the metadata; one value for each layer is taken if all layers agree."""
    value = header.metadata.get(key, default)
    if isinstance(value, list) and value and len(set(value)) == 1:
        value = value[0]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ModelError(f"{header.path}: {key} should be a positive number and is {value!r}.", hint=ELSEWHERE)
    return value


def _decimal(header: Header, key: str, *, default: float | None = None) -> float:
    """A positive float of the metadata, as people write it: GGUF's float32 0.0000099999997 is 1e-05 again."""
    value = header.metadata.get(key, default)
    if not isinstance(value, float) or not 0 < value < float("inf"):
        raise ModelError(f"{header.path}: {key} should be a positive number and is {value!r}.", hint=ELSEWHERE)
    return float(str(np.float32(value)))


def _shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor that a model of this config has: Hugging Face name -> shape."""
    hidden, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    linears = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        shapes[f"{prefix}.input_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
        for module, shape in linears.items():
            shapes[f"{prefix}.{module}.weight"] = shape
            if _has_bias(config, module):
                shapes[f"{prefix}.{module}.bias"] = shape[:1]
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocabulary, hidden)
    return shapes


def _has_bias(config: dict[str, Any], module: str) -> bool:
    if config["model_type"] == "qwen2":
        return module in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    return bool(config["mlp_bias" if module.startswith("mlp.") else "attention_bias"])


def _check_tensors(header: Header, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raise ModelError unless the file has exactly the tensors of `shapes`."""
    expected = {_gguf_name(name): shape for name, shape in shapes.items()}
    for name, shape in expected.items():
        if name not in header.tensors:
            raise ModelError(f"{header.path}: the tensor {name} is missing.", hint=ELSEWHERE)
        if header.tensors[name].shape != shape:
            raise ModelError(
                f"{header.path}: the tensor {name} has the shape {header.tensors[name].shape}, not {shape}.",
                hint=ELSEWHERE,
            )
    unknown = sorted(header.tensors.keys() - expected.keys() - {ROPE_FACTORS})
    if unknown:
        raise ModelError(
            f"{header.path}: {len(unknown)} tensors that such a model lacks, the first is {unknown[0]}.",
            hint=ELSEWHERE,
        )
