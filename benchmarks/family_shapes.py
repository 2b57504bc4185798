"""A config.json for every family that octavo supports: the widths of a released model, with fewer layers where needed.

Each model has 0.8 to 2.5 billion parameters, so that a GPU makes its weights in a second. A name with a number of
layers at its end has those of the released model cut to that number. Sources: the config.json of the releases, as
docs and papers of their authors give them. Importing this module imports no package.
"""

from __future__ import annotations

from typing import Any

SLIDING, FULL = "sliding_attention", "full_attention"


def _llama(
    model_type: str,
    architecture: str,
    *,
    width: int,
    mlp: int,
    layers: int,
    heads: tuple[int, int],
    vocab: int,
    theta: float | None = 10000.0,
    **more: Any,
) -> dict[str, Any]:
    """The keys that all configs have which are named as Llama's. `heads`: of queries, and of keys and values."""
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": theta}} if theta else {}
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
        **rope,
        **more,
    }


_LLAMA3_ROPE: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 1000000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
_LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 48,
    "long_factor": [1.5] * 48,
}
_GEMMA: dict[str, Any] = {
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-6,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_act": "gelu_pytorch_tanh",
}
_GEMMA3_ROPE = {
    FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
    SLIDING: {"rope_type": "default", "rope_theta": 10000.0},
}
_UNTIED: dict[str, Any] = {"tie_word_embeddings": False}

# The name of each model says which release its widths are from; the key model_type is the family.
FAMILY_SHAPES: dict[str, dict[str, Any]] = {
    "gpt2-xl-20": {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": 50257, "n_positions": 1024,
        "n_embd": 1600, "n_layer": 20, "n_head": 25, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
    },
    "gpt-j-6b-4": {
        "architectures": ["GPTJForCausalLM"], "model_type": "gptj", "vocab_size": 50400, "n_positions": 2048,
        "n_embd": 4096, "n_layer": 4, "n_head": 16, "rotary_dim": 64, "n_inner": 16384,
        "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": False,
    },
    "llama-3.2-1b": _llama(
        "llama", "LlamaForCausalLM", width=2048, mlp=8192, layers=16, heads=(32, 8), vocab=128256, theta=None,
        rope_parameters=_LLAMA3_ROPE,
    ),
    "mistral-7b-v0.1-5": _llama(
        "mistral", "MistralForCausalLM", width=4096, mlp=14336, layers=5, heads=(32, 8), vocab=32000,
        sliding_window=4096, **_UNTIED,
    ),
    "ministral-8b-4": _llama(
        "ministral", "MinistralForCausalLM", width=4096, mlp=12288, layers=4, heads=(32, 8), vocab=131072, theta=1e8,
        head_dim=128, sliding_window=32768, layer_types=[FULL, SLIDING, SLIDING, SLIDING], **_UNTIED,
    ),
    "ministral-3-3b-8": _llama(
        "ministral3", "Ministral3ForCausalLM", width=3072, mlp=9216, layers=8, heads=(32, 8), vocab=131072, theta=None,
        head_dim=128, rope_parameters=_YARN,
    ),
    "qwen2.5-1.5b-16": _llama(
        "qwen2", "Qwen2ForCausalLM", width=1536, mlp=8960, layers=16, heads=(12, 2), vocab=151936, theta=1e6,
    ),
    "qwen3-1.7b-14": _llama(
        "qwen3", "Qwen3ForCausalLM", width=2048, mlp=6144, layers=14, heads=(16, 8), vocab=151936, theta=1e6,
        head_dim=128,
    ),
    "smollm3-3b-12": _llama(
        "smollm3", "SmolLM3ForCausalLM", width=2048, mlp=11008, layers=12, heads=(16, 4), vocab=128256, theta=5e6,
        no_rope_layers=[1, 1, 1, 0] * 3,
    ),
    "granite-3.1-2b-16": _llama(
        "granite", "GraniteForCausalLM", width=2048, mlp=8192, layers=16, heads=(32, 8), vocab=49155, theta=5e6,
        embedding_multiplier=12.0, residual_multiplier=0.22, attention_multiplier=0.015625, logits_scaling=8.0,
    ),
    "olmo-2-1b": _llama(
        "olmo2", "Olmo2ForCausalLM", width=2048, mlp=8192, layers=16, heads=(16, 16), vocab=100352, theta=5e5,
        **_UNTIED,
    ),
    "gemma-2-2b-8": _llama(
        "gemma2", "Gemma2ForCausalLM", width=2304, mlp=9216, layers=8, heads=(8, 4), vocab=256000,
        sliding_window=4096, attn_logit_softcapping=50.0, final_logit_softcapping=30.0, **_GEMMA,
    ),
    "gemma-3-1b": _llama(
        "gemma3_text", "Gemma3ForCausalLM", width=1152, mlp=6912, layers=26, heads=(4, 1), vocab=262144, theta=None,
        sliding_window=512, rope_parameters={**_GEMMA3_ROPE, FULL: {"rope_type": "default", "rope_theta": 1000000.0}},
        **_GEMMA,
    ),
    "olmo-3-7b-4": _llama(
        "olmo3", "Olmo3ForCausalLM", width=4096, mlp=11008, layers=4, heads=(32, 32), vocab=100278, theta=None,
        rope_parameters={key: {"rope_type": "default", "rope_theta": 500000.0} for key in (FULL, SLIDING)},
        sliding_window=4096, layer_types=[SLIDING, SLIDING, SLIDING, FULL], **_UNTIED,
    ),
    "phi-4-mini-8": _llama(
        "phi3", "Phi3ForCausalLM", width=3072, mlp=8192, layers=8, heads=(24, 8), vocab=200064, theta=None,
        original_max_position_embeddings=4096, max_position_embeddings=131072, partial_rotary_factor=0.75,
        rope_parameters={**_LONGROPE, "partial_rotary_factor": 0.75},
    ),
    "pythia-1.4b": {
        "architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox", "vocab_size": 50304,
        "max_position_embeddings": 2048, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24,
        "num_attention_heads": 16, "hidden_act": "gelu", "rotary_pct": 0.25, "use_parallel_residual": True,
        "layer_norm_eps": 1e-5, "tie_word_embeddings": False,
    },
    "gpt-neo-1.3b": {
        "architectures": ["GPTNeoForCausalLM"], "model_type": "gpt_neo", "vocab_size": 50257,
        "max_position_embeddings": 2048, "hidden_size": 2048, "num_layers": 24, "num_heads": 16,
        "attention_types": [[["global", "local"], 12]], "window_size": 256, "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
    },
    "gemma-3-4b-6": {
        "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "tie_word_embeddings": True,
        "text_config": _llama(
            "gemma3_text", "Gemma3ForCausalLM", width=2560, mlp=10240, layers=6, heads=(8, 4), vocab=262208,
            theta=None, sliding_window=1024, rope_parameters=_GEMMA3_ROPE, **_GEMMA,
        ),
    },
    "mistral-small-3.1-2": {
        "architectures": ["Mistral3ForConditionalGeneration"], "model_type": "mistral3", "tie_word_embeddings": False,
        "text_config": _llama(
            "mistral", "MistralForCausalLM", width=5120, mlp=32768, layers=2, heads=(32, 8), vocab=131072, theta=1e9,
            head_dim=128, sliding_window=None, **_UNTIED,
        ),
    },
}  # fmt: skip
# Rows and tokens of a batch: 4,096 tokens. One long row where a window would be longer than rows of 2,048 tokens.
BATCH = (2, 2048)
BATCHES = {"gpt2-xl-20": (4, 1024)} | dict.fromkeys(("mistral-7b-v0.1-5", "olmo-3-7b-4", "gemma-2-2b-8"), (1, 6144))

_TINY_LAYERS = 2
_TINY: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 128, "n_embd": 128, "intermediate_size": 256, "n_inner": 512, "n_head": 4,
    "num_heads": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "rotary_dim": 16,
    "query_pre_attn_scalar": 32, "window_size": 8, "attention_types": [[["global", "local"], 1]],
    "n_layer": _TINY_LAYERS, "num_layers": _TINY_LAYERS, "num_hidden_layers": _TINY_LAYERS,
}  # fmt: skip


def tiny_config(config: dict[str, Any]) -> dict[str, Any]:
    """The config with two narrow layers. The other settings of its family stay."""
    small = {**config, **{key: value for key, value in _TINY.items() if key in config}}
    if "text_config" in config:
        small["text_config"] = tiny_config(config["text_config"])
    if config.get("sliding_window"):
        small["sliding_window"] = 8
    for key in ("layer_types", "no_rope_layers"):
        if key in config:
            small[key] = config[key][-_TINY_LAYERS:]
    if config.get("rope_parameters", {}).get("rope_type") == "longrope":
        factors = dict.fromkeys(("short_factor", "long_factor"), [1.0] * 12)  # of 0.75 of a head of 32, by pairs
        small["rope_parameters"] = {**config["rope_parameters"], **factors}
    return small
