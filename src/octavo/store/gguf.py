"""A GGUF file as a source of weights, with Hugging Face names and row order, one tensor in memory at a time.

GGUF is llama.cpp's format: one or several files with metadata, tokenizer and block-quantized tensors. The architectures
`llama` (Llama 2 and 3, SmolLM2, Mistral) and `qwen2` are read. Features that octavo does not compute, such as other
rotary scaling or experts, raise an error that names them.
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
from octavo.models.weight_map import RowOrder
from octavo.store.gguf_header import Header, TensorInfo
from octavo.store.gguf_rope import llama3_rope
from octavo.store.gguf_split import read_parts
from octavo.store.gguf_tokenizer import build_tokenizer
from octavo.store.gguf_vocabulary import ELSEWHERE, special_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}

# Hugging Face module -> GGUF module. Modules of a block have the prefix model.layers.N. and blk.N.
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
    """An opened GGUF file. `config` is equivalent to the config.json of the Hugging Face model."""

    config: dict[str, Any]
    files: list[Path]
    _header: Header = field(repr=False)
    _shapes: dict[str, tuple[int, ...]] = field(repr=False)

    @property
    def generation_config(self) -> dict[str, Any]:
        """Empty: a GGUF file has no generation config."""
        return {}

    def names(self) -> list[str]:
        """Hugging Face tensor names in the order of the forward pass. A tied head has no tensor of its own."""
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the tensor `name`."""
        return self._shapes[name]

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor `name` (one of `names()`), dequantized to float32, with rows in Hugging Face order.

        Raises ModelError if the file is shorter than when it was opened.
        """
        info = self._header.tensors[_gguf_name(name)]
        values = _read(info, name)
        order = self._row_order(name)
        return values if order is None else order.from_checkpoint(values)

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The file's tokenizer. Raises ModelError if octavo cannot reproduce it exactly."""
        return build_tokenizer(
            self._header.metadata,
            where=str(self._header.path),
            max_length=self.config["max_position_embeddings"],
        )

    def _row_order(self, name: str) -> RowOrder | None:
        """The order of the rows of q and k, weights and biases, which llama.cpp's converter permutes in a llama.

        Rotary embedding rotates pairs of rows of a head. llama.cpp pairs (0, 1), (2, 3), ..; Hugging Face pairs
        (0, D/2), (1, D/2 + 1), ... Source: LlamaModel.permute in convert_hf_to_gguf.py.
        """
        heads = {".q_proj.": "num_attention_heads", ".k_proj.": "num_key_value_heads"}
        if self.config["model_type"] == "llama":
            for part, key in heads.items():
                if part in name:
                    return RowOrder((self.config[key], self.config["head_dim"] // 2, 2), (0, 2, 1))
        return None


def open_gguf(path: Path) -> GgufSource:
    """Opens the GGUF file at `path`: reads and checks the header, no weights.

    Raises ModelError if the file is broken, has an architecture not in ARCHITECTURES, uses a feature that octavo does
    not compute, or lacks a tensor, has an unknown one, or one of another shape than its metadata says.
    """
    header, files = read_parts(path)
    config = _config(header)
    shapes = _shapes(config)
    _check_tensors(header, shapes)
    n_tokens = len(header.metadata["tokenizer.ggml.tokens"])
    if n_tokens > config["vocab_size"]:
        raise ModelError(f"{path}: {n_tokens:,} tokens, but the embedding has {config['vocab_size']:,} rows.")
    return GgufSource(config=config, files=files, _header=header, _shapes=shapes)


def _read(info: TensorInfo, name: str) -> torch.Tensor:
    """A tensor dequantized to float32, in the row order of the file."""
    with info.path.open("rb") as file:
        file.seek(info.offset)
        raw = file.read(info.size_bytes)
    if len(raw) != info.size_bytes:
        raise ModelError(f"{info.path}: the file changed while it was read ({name} is cut short).")
    rows = np.frombuffer(raw, dtype=np.uint8).reshape(*info.shape[:-1], -1)
    # Copied into writable memory of its own: an unquantized type is returned as a view of `raw`.
    return torch.from_numpy(np.array(dequantize(rows, info.kind), dtype=np.float32)).reshape(info.shape)


def _gguf_name(name: str) -> str:
    module, _, suffix = name.rpartition(".")
    block = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module)
    return f"blk.{block[1]}.{BLOCK_MODULES[block[2]]}.{suffix}" if block else f"{TOP_MODULES[module]}.{suffix}"


def _config(header: Header) -> dict[str, Any]:
    """The metadata as the entries of a Hugging Face config.json."""
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
        # Attention with a sliding window (Mistral 7B v0.1) equals full attention for contexts within the window.
        "max_position_embeddings": min(size("context_length"), _window(header, architecture)),
        **_options(header, architecture),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "dtype": "float32",
        **{f"{role}_token_id": number for role, number in special_ids(header.metadata, str(header.path)).items()},
    }


def _rope(header: Header, architecture: str, head_dim: int) -> dict[str, Any]:
    theta = _decimal(header, f"{architecture}.rope.freq_base", default=10_000.0)
    info = header.tensors.get(ROPE_FACTORS)
    if info is None:
        return {"rope_theta": theta}
    factors = _read(info, ROPE_FACTORS).flatten()  # (D/2,)
    return {"rope_parameters": llama3_rope(factors, theta=theta, head_size=head_dim, path=header.path)}


def _window(header: Header, architecture: str) -> int:
    """The number of positions that attention covers: the sliding window, or the context length without one."""
    context = _size(header, f"{architecture}.context_length")
    window = header.metadata.get(f"{architecture}.attention.sliding_window") or context
    if type(window) is not int or window < 1:
        raise ModelError(f"{header.path}: {architecture}.attention.sliding_window is {shown(window)}.", hint=ELSEWHERE)
    return window


def _options(header: Header, architecture: str) -> dict[str, Any]:
    """The entries of config.json that only this architecture has."""
    if architecture == "qwen2":
        return {"use_sliding_window": False}
    biases = {"attention_bias": "attn_q", "mlp_bias": "ffn_gate"}
    return {key: f"blk.0.{module}.bias" in header.tensors for key, module in biases.items()}


def _refuse_uncomputed(header: Header, architecture: str) -> None:
    """ModelError if the metadata asks for a feature that octavo's model of this family does not compute."""
    metadata = header.metadata
    scaling = metadata.get(f"{architecture}.rope.scaling.type", "none")
    factors = [metadata.get(f"{architecture}.rope.{key}", 1.0) for key in ("scaling.factor", "scale_linear")]
    feature = ""
    if scaling != "none":
        feature = f"rotary scaling ({architecture}.rope.scaling.type = {scaling!r})"
    elif any(factor not in (0.0, 1.0) for factor in factors):
        feature = f"rotary scaling (factor {factors[0] if factors[0] not in (0.0, 1.0) else factors[1]})"
    elif metadata.get(f"{architecture}.expert_count", 0):
        feature = f"a mixture of experts ({architecture}.expert_count)"
    if feature:
        raise ModelError(f"{header.path}: the model uses {feature}, which is not supported.", hint=ELSEWHERE)


def _size(header: Header, key: str, *, default: int | None = None) -> int:
    """A positive integer of the metadata. A list with one value per layer is accepted if all layers agree."""
    value = header.metadata.get(key, default)
    if isinstance(value, list) and value and len(set(value)) == 1:
        value = value[0]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ModelError(f"{header.path}: {key} should be a positive number and is {value!r}.", hint=ELSEWHERE)
    return value


def _decimal(header: Header, key: str, *, default: float | None = None) -> float:
    """A positive float of the metadata in its shortest decimal form: float32 0.0000099999997 becomes 1e-05."""
    value = header.metadata.get(key, default)
    if not isinstance(value, float) or not 0 < value < float("inf"):
        raise ModelError(f"{header.path}: {key} should be a positive number and is {value!r}.", hint=ELSEWHERE)
    return float(str(np.float32(value)))


def _shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Hugging Face name -> shape, for every tensor of a model with this config."""
    hidden, intermediate, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    linears = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
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
    """ModelError unless the file has exactly the tensors of `shapes`."""
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
