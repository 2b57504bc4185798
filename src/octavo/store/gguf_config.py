"""The metadata of a GGUF file as the entries of a Hugging Face config.json.

llama.cpp hard-codes what its converter does not write: the pattern of sliding windows, the scale of scores, the layers
without rotary positions. Those constants are here, with their source (llama.cpp's load_hparams of each architecture).
"""

from __future__ import annotations

from typing import Any

from octavo.errors import ModelError
from octavo.models.layer_attention import FULL, SLIDING
from octavo.store.gguf_header import Header
from octavo.store.gguf_metadata import Metadata
from octavo.store.gguf_names import architecture_of
from octavo.store.gguf_rope import llama3_rope
from octavo.store.gguf_tensor import read_tensor
from octavo.store.gguf_vocabulary import ELSEWHERE, special_ids

ROPE_FACTORS = "rope_freqs.weight"
# Gemma: a layer has no window if its number, counted from 1, is a multiple of the pattern. Its largest models scale
# scores by the square root of width / heads in place of the size of a head; llama.cpp knows them by their layers.
GEMMA_PATTERN = {"gemma2": 2, "gemma3": 6}
GEMMA_27B_LAYERS = {"gemma2": 46, "gemma3": 62}
GEMMA2_WINDOW = 4096
GEMMA2_SOFTCAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
GEMMA3_LOCAL_THETA = 10_000.0  # the base of rotary positions of the layers with a window
SMOLLM3_INTERVAL = 4  # every fourth layer has no rotary positions
# config.json -> metadata. logits_scaling divides the logits, as llama.cpp does with logit_scale.
GRANITE_SCALES = {
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "attention_multiplier": "attention.scale",
    "logits_scaling": "logit_scale",
}


def config_of(header: Header) -> dict[str, Any]:
    """The config.json of the model. ModelError for an unsupported architecture or feature, or broken metadata."""
    name, architecture = architecture_of(header)
    metadata = Metadata(header, name)
    _refuse_uncomputed(metadata)
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None:
        raise ModelError(f"{header.path}: the tensor token_embd.weight is missing.", hint=ELSEWHERE)
    layers = metadata.size("block_count")
    if layers > len(header.tensors):
        raise ModelError(f"{header.path}: {layers:,} layers, but only {len(header.tensors)} tensors.", hint=ELSEWHERE)
    heads = metadata.size("attention.head_count")
    common = {
        "architectures": [architecture.hugging_face],
        "model_type": architecture.model_type,
        "vocab_size": embedding.shape[0],
        "hidden_size": metadata.size("embedding_length"),
        "intermediate_size": metadata.size("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.size("attention.head_count_kv", heads),
        "head_dim": _head_dim(metadata, heads),
        "rms_norm_eps": metadata.decimal("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": metadata.size("context_length"),
        "tie_word_embeddings": not metadata.has_tensor("output.weight"),
        "dtype": "float32",
        **{f"{role}_token_id": number for role, number in special_ids(header.metadata, str(header.path)).items()},
    }
    own = _gemma(metadata, common) if name in GEMMA_PATTERN else _llama_like(metadata, common)
    return common | own


def _head_dim(metadata: Metadata, heads: int) -> int:
    head_dim = metadata.size("attention.key_length", metadata.size("embedding_length") // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if metadata.size(key, head_dim) != head_dim:
            raise ModelError(
                f"{metadata.path}: {metadata.architecture}.{key} is {metadata.size(key)}, but a head has {head_dim} "
                "dimensions.",
                hint="Such heads are not supported. " + ELSEWHERE,
            )
    return head_dim


def _llama_like(metadata: Metadata, common: dict[str, Any]) -> dict[str, Any]:
    """The entries of Llama and the families with a block like its."""
    name, context = metadata.architecture, common["max_position_embeddings"]
    entries: dict[str, Any] = {
        "hidden_act": "silu",
        **_rope(metadata, common["head_dim"]),
        # Attention with a sliding window (Mistral 7B v0.1) equals full attention for contexts within the window.
        "max_position_embeddings": min(context, metadata.window(context)),
    }
    if name in ("qwen2", "qwen3", "smollm3"):
        entries["use_sliding_window"] = False
    if name != "qwen2":  # which has biases on q, k and v, and no entry for them
        entries["attention_bias"] = metadata.has_tensor("blk.0.attn_q.bias")
    if name in ("llama", "granite", "smollm3"):
        entries["mlp_bias"] = metadata.has_tensor("blk.0.ffn_gate.bias")
    if name == "granite":
        scale = common["head_dim"] ** -0.5
        for key, stored in GRANITE_SCALES.items():
            entries[key] = metadata.optional_decimal(stored) or (scale if key == "attention_multiplier" else 1.0)
    if name == "smollm3":
        layers = range(common["num_hidden_layers"])
        entries["no_rope_layers"] = [int((layer + 1) % SMOLLM3_INTERVAL != 0) for layer in layers]
    if name == "olmo2" and metadata.get("attention.sliding_window"):
        raise metadata.refused("sliding windows (OLMo 3)")
    return entries


def _gemma(metadata: Metadata, common: dict[str, Any]) -> dict[str, Any]:
    """The entries of Gemma 2 and 3: soft-caps, the scale of scores, and the window and rotary positions of layers."""
    name, layers, head_dim = metadata.architecture, common["num_hidden_layers"], common["head_dim"]
    second = name == "gemma2"
    caps = {key: metadata.optional_decimal(key, GEMMA2_SOFTCAPS[key] if second else None) for key in GEMMA2_SOFTCAPS}
    slides = _sliding(metadata, layers)
    large = layers == GEMMA_27B_LAYERS[name]
    entries = {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": common["hidden_size"] // common["num_attention_heads"] if large else head_dim,
        "sliding_window": metadata.window(GEMMA2_WINDOW) if any(slides) else None,
        "layer_types": [SLIDING if slide else FULL for slide in slides],
        "attention_bias": False,
        **caps,
    }
    if second:
        return entries | _rope(metadata, head_dim)
    local = {"rope_type": "default", "rope_theta": metadata.decimal("rope.freq_base_swa", GEMMA3_LOCAL_THETA)}
    return entries | {"rope_parameters": {FULL: _rope_parameters(metadata, head_dim), SLIDING: local}}


def _sliding(metadata: Metadata, layers: int) -> list[bool]:
    """Whether each layer of a Gemma has a sliding window; of a Gemma 3 without the key for its size, none has."""
    if metadata.architecture == "gemma3" and not metadata.get("attention.sliding_window"):
        return [False] * layers
    key = "attention.sliding_window_pattern"
    pattern = metadata.get(key, GEMMA_PATTERN[metadata.architecture])
    if isinstance(pattern, list) and len(pattern) == layers and all(type(slide) is bool for slide in pattern):
        return pattern
    if type(pattern) is not int or pattern < 1:
        raise metadata.wrong(key, "should be a positive number and")
    return [(layer + 1) % pattern != 0 for layer in range(layers)]


def _rope(metadata: Metadata, head_dim: int) -> dict[str, Any]:
    """The entries of rotary positions of a model with one type of layers."""
    parameters = _rope_parameters(metadata, head_dim)
    if metadata.has_tensor(ROPE_FACTORS) or parameters["rope_type"] != "default":
        return {"rope_parameters": parameters}
    return {"rope_theta": parameters["rope_theta"]}


def _rope_parameters(metadata: Metadata, head_dim: int) -> dict[str, Any]:
    theta = metadata.decimal("rope.freq_base", 10_000.0)
    factor = _rope_factor(metadata)
    info = metadata.header.tensors.get(ROPE_FACTORS)
    if info is not None and factor != 1:
        raise metadata.refused(f"two rotary scalings (a factor of {factor:g} and the tensor {ROPE_FACTORS})")
    if info is not None:
        factors = read_tensor(info, ROPE_FACTORS).flatten()  # (D/2,)
        return llama3_rope(factors, theta=theta, head_size=head_dim, path=metadata.path)
    if factor != 1:
        return {"rope_type": "linear", "rope_theta": theta, "factor": factor}
    return {"rope_type": "default", "rope_theta": theta}


def _rope_factor(metadata: Metadata) -> float:
    """The factor of linear scaling, 1 without one. llama.cpp takes a factor without a type for linear scaling."""
    for key in ("rope.scaling.factor", "rope.scale_linear"):
        if (factor := metadata.optional_decimal(key)) is not None:
            return 1.0 if metadata.get("rope.scaling.type") == "none" else factor
    return 1.0


def _refuse_uncomputed(metadata: Metadata) -> None:
    """ModelError if the metadata asks for a feature that octavo's model of this family does not compute."""
    scaling = metadata.get("rope.scaling.type", "none")
    if scaling not in ("none", "linear"):
        raise metadata.refused(f"rotary scaling ({metadata.architecture}.rope.scaling.type = {scaling!r})")
    if metadata.get("expert_count", 0):
        raise metadata.refused(f"a mixture of experts ({metadata.architecture}.expert_count)")
    if metadata.get("attention.causal", True) is not True:
        raise metadata.refused(f"attention in both directions ({metadata.architecture}.attention.causal)")
