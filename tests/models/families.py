"""Tiny configs of every family, for the parity tests: with and without shared key heads, biases, a tied head, windows.

transformers gives SmolLM3 and OLMo 2 a padding token, whose row of the embedding then has no gradient: here they have
none.
"""

from __future__ import annotations

from typing import Any

from transformers import (
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoConfig,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    Ministral3Config,
    MinistralConfig,
    Mistral3Config,
    MistralConfig,
    Olmo2Config,
    Olmo3Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

VOCABULARY, LENGTH = 97, 40

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 512}
YARN_SETTINGS = {
    "mscale": 0.7, "mscale_all_dim": 1.2, "beta_fast": 20.0, "beta_slow": 2.0, "truncate": False, "factor": 16.0,
}  # fmt: skip
DYNAMIC_ROPE = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 3.0}
GROWTH = {"llama_4_scaling_beta": 0.3, "original_max_position_embeddings": 12}
LONGROPE = {
    "original_max_position_embeddings": 16,
    "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 1.1, 1.2, 1.3, 1.5, 1.7],
        "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 5.0],
    },
}  # fmt: skip
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5}


def like_llama(heads: int, groups: int, **changes: Any) -> dict[str, Any]:
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "max_position_embeddings": 2048,
    }
    return shape | changes


def like_gptj(heads: int, rotary: int, **changes: Any) -> dict[str, Any]:
    shape = {
        "vocab_size": VOCABULARY,
        "n_embd": 48,
        "n_layer": 2,
        "n_head": heads,
        "rotary_dim": rotary,
        "n_positions": 2048,
    }
    return shape | changes


def like_neox(heads: int, **changes: Any) -> dict[str, Any]:
    shape = like_llama(heads, heads, intermediate_size=96)
    del shape["num_key_value_heads"]
    return shape | changes


def like_neo(heads: int, kinds: list[str], window: int, **changes: Any) -> dict[str, Any]:
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 48,
        "num_layers": len(kinds),
        "num_heads": heads,
        "attention_types": [[kinds, 1]],
        "window_size": window,
        "max_position_embeddings": 2048,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return shape | changes


def like_gpt2(heads: int, **changes: Any) -> dict[str, Any]:
    shape = {
        "vocab_size": VOCABULARY,
        "n_embd": 48,
        "n_layer": 2,
        "n_head": heads,
        "n_positions": 2048,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return shape | changes


def composite(config: Any, vision: str, *, tied: bool = True, **text: Any) -> Any:
    """A config of a model of text and images, with a vision part of one layer."""
    image = {
        "model_type": vision, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8,
        "intermediate_size": 16, "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    return config(vision_config=image, text_config=text, tie_word_embeddings=tied)


MULTIPLIERS = {
    "embedding_multiplier": 3.0, "logits_scaling": 0.7, "residual_multiplier": 0.4, "attention_multiplier": 0.2,
}  # fmt: skip
SEQUENTIAL = {"use_parallel_residual": False}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 20, "pad_token_id": None}
# Only eager attention of transformers soft-caps scores: the others ignore the soft-cap.
EAGER = {"attn_implementation": "eager"}
SLIDING, FULL = "sliding_attention", "full_attention"
GEMMA3_ROPE = {
    FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5},
    SLIDING: {"rope_type": "default", "rope_theta": 2e3},
}  # fmt: skip
CASES = {
    "llama, grouped heads, tied": LlamaConfig(**like_llama(6, 2, tie_word_embeddings=True)),
    "llama, one key head, three layers": LlamaConfig(**like_llama(4, 1, num_hidden_layers=3)),
    "llama, all biases, llama3 rope": LlamaConfig(
        **like_llama(4, 4, attention_bias=True, mlp_bias=True, rope_parameters=LLAMA3_ROPE)
    ),
    "llama, wide heads, linear rope": LlamaConfig(**like_llama(3, 3, head_dim=24, rope_parameters=LINEAR_ROPE)),
    "llama, other eps and base": LlamaConfig(
        **like_llama(4, 2, rms_norm_eps=1e-2, rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    ),
    "llama, yarn": LlamaConfig(**like_llama(4, 2, rope_parameters=YARN)),
    "llama, yarn with all settings": LlamaConfig(**like_llama(2, 1, head_dim=32, rope_parameters=YARN | YARN_SETTINGS)),
    "llama, dynamic rope, longer than its context": LlamaConfig(
        **like_llama(4, 2, max_position_embeddings=24, rope_parameters=DYNAMIC_ROPE)
    ),
    "mistral, short window": MistralConfig(**like_llama(4, 2, head_dim=16, sliding_window=7)),
    "mistral, window of two positions": MistralConfig(**like_llama(3, 1, num_hidden_layers=1, sliding_window=2)),
    "mistral, no window": MistralConfig(**like_llama(4, 4, sliding_window=None)),
    "qwen2, grouped heads": Qwen2Config(**like_llama(4, 2)),
    "qwen2, windows in the last layers": Qwen2Config(
        **like_llama(4, 4, num_hidden_layers=3, use_sliding_window=True, sliding_window=5, max_window_layers=1)
    ),
    "qwen2, one key head, tied": Qwen2Config(**like_llama(2, 1, tie_word_embeddings=True)),
    "gptj, partial rotary": GPTJConfig(**like_gptj(4, 4)),
    "gptj, whole rotary, own width": GPTJConfig(**like_gptj(2, 24, n_inner=100, n_layer=3)),
    "gptj, tied, other eps": GPTJConfig(**like_gptj(3, 6, tie_word_embeddings=True, layer_norm_epsilon=1e-2)),
    "qwen3, grouped heads": Qwen3Config(**like_llama(4, 2, head_dim=16)),
    "qwen3, wide heads, biases, tied": Qwen3Config(
        **like_llama(3, 1, head_dim=24, attention_bias=True, tie_word_embeddings=True)
    ),
    "qwen3, windows in given layers": Qwen3Config(
        **like_llama(
            4,
            2,
            head_dim=16,
            use_sliding_window=True,
            sliding_window=9,
            layer_types=["sliding_attention", "full_attention"],
        )
    ),
    "mistral, windows in given layers": MinistralConfig(  # AutoConfig reads a Mistral with layer_types so
        **like_llama(4, 2, head_dim=16, sliding_window=6, layer_types=["full_attention", "sliding_attention"])
    ),
    "llama, llama3 rope, original context outside of it": LlamaConfig(
        **like_llama(4, 2, original_max_position_embeddings=24, rope_parameters=LLAMA3_ROPE)
    ),
    "llama, yarn with beta_fast below beta_slow": LlamaConfig(
        **like_llama(4, 2, rope_parameters=YARN | {"beta_fast": 1.0, "beta_slow": 32.0})
    ),
    "ministral, windows in given layers": MinistralConfig(
        **like_llama(4, 2, head_dim=16, sliding_window=6, layer_types=["full_attention", "sliding_attention"])
    ),
    "ministral3, queries that grow": Ministral3Config(
        **like_llama(4, 2, head_dim=16, pad_token_id=None, rope_parameters=YARN | GROWTH)
    ),
    "ministral3, no growth, tied": Ministral3Config(
        **like_llama(3, 1, head_dim=24, tie_word_embeddings=True, pad_token_id=None)
    ),
    "ministral3, window": Ministral3Config(**like_llama(2, 2, head_dim=16, sliding_window=9, pad_token_id=None)),
    "gemma3, text part": composite(
        Gemma3Config,
        "siglip_vision_model",
        model_type="gemma3_text",
        query_pre_attn_scalar=16,
        pad_token_id=None,
        **like_llama(4, 2, head_dim=16, sliding_window=6, layer_types=["sliding_attention", "full_attention"]),
    ),
    "mistral3, text part of ministral3": composite(
        Mistral3Config,
        "pixtral",
        model_type="ministral3",
        pad_token_id=None,
        **like_llama(4, 2, head_dim=16, rope_parameters=YARN | GROWTH),
    ),
    "mistral3, text part of mistral, own head": composite(
        Mistral3Config, "pixtral", tied=False, model_type="mistral", **like_llama(3, 1, sliding_window=None)
    ),
    "phi3, grouped heads": Phi3Config(**like_llama(4, 2, pad_token_id=None)),
    "phi3, part of a head, tied, window": Phi3Config(
        **like_llama(2, 2, partial_rotary_factor=0.75, tie_word_embeddings=True, sliding_window=8, pad_token_id=None)
    ),
    "phi3, longrope": Phi3Config(**like_llama(4, 4, pad_token_id=None, **LONGROPE)),
    "phi3, longrope of shorter rows": Phi3Config(
        **like_llama(4, 1, pad_token_id=None, **LONGROPE | {"original_max_position_embeddings": 1024})
    ),
    "olmo3, windows in three of four layers": Olmo3Config(
        **like_llama(4, 2, num_hidden_layers=4, sliding_window=7, eos_token_id=2, pad_token_id=None)
    ),
    "olmo3, yarn in full layers, tied": Olmo3Config(
        **like_llama(
            3,
            3,
            sliding_window=5,
            tie_word_embeddings=True,
            eos_token_id=2,
            pad_token_id=None,
            rope_scaling=YARN,
            layer_types=["sliding_attention", "full_attention"],
        )
    ),
    "olmo3, one key head, biases": Olmo3Config(
        **like_llama(4, 1, attention_bias=True, sliding_window=30, eos_token_id=2, pad_token_id=None)
    ),
    "smollm3, every third layer without rotary": SmolLM3Config(
        **like_llama(
            4, 2, num_hidden_layers=3, no_rope_layer_interval=3, pad_token_id=None, bos_token_id=1, eos_token_id=2
        )
    ),
    "smollm3, given layers without rotary, untied": SmolLM3Config(
        **like_llama(
            3,
            1,
            num_hidden_layers=3,
            no_rope_layers=[0, 1, 0],
            tie_word_embeddings=False,
            pad_token_id=None,
            bos_token_id=1,
            eos_token_id=2,
        )
    ),
    "smollm3, windows that layer_types name": SmolLM3Config(
        **like_llama(
            4,
            2,
            sliding_window=5,
            layer_types=["sliding_attention"] * 2,
            pad_token_id=None,
            bos_token_id=1,
            eos_token_id=2,
        )
    ),
    "smollm3, biases": SmolLM3Config(
        **like_llama(2, 2, attention_bias=True, mlp_bias=True, pad_token_id=None, bos_token_id=1, eos_token_id=2)
    ),
    "olmo2, grouped heads": Olmo2Config(**like_llama(4, 2, eos_token_id=2, pad_token_id=None)),
    "olmo2, tied": Olmo2Config(**like_llama(3, 3, tie_word_embeddings=True, eos_token_id=2, pad_token_id=None)),
    "olmo2, one key head, biases": Olmo2Config(
        **like_llama(4, 1, attention_bias=True, eos_token_id=2, pad_token_id=None)
    ),
    "granite, all multipliers": GraniteConfig(**like_llama(4, 2, **MULTIPLIERS)),
    "granite, tied, biases": GraniteConfig(
        **like_llama(3, 1, tie_word_embeddings=True, attention_bias=True, mlp_bias=True, **MULTIPLIERS)
    ),
    "granite, one multiplier, three layers": GraniteConfig(
        **like_llama(2, 2, num_hidden_layers=3, attention_multiplier=0.1)
    ),
    "gemma2, grouped heads, window, soft-caps": Gemma2Config(
        **like_llama(4, 2, num_hidden_layers=3, sliding_window=7, **GEMMA, **EAGER)
        | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
    ),
    "gemma2, one key head, untied, biases, given layers": Gemma2Config(
        **like_llama(3, 1, sliding_window=5, layer_types=[FULL, SLIDING], attention_bias=True, **GEMMA, **EAGER)
        | {"tie_word_embeddings": False}
    ),
    "gemma2, no soft-cap of scores, own base, other eps": Gemma2Config(
        **like_llama(4, 4, rms_norm_eps=1e-2, **GEMMA)
        | {"attn_logit_softcapping": None, "final_logit_softcapping": 2.5}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
    ),
    "gemma2, no soft-cap of logits": Gemma2Config(
        **like_llama(2, 2, sliding_window=3, **GEMMA, **EAGER)
        | {"attn_logit_softcapping": 1.5, "final_logit_softcapping": None}
    ),
    "gemma3, a full layer after five": Gemma3TextConfig(
        **like_llama(4, 2, num_hidden_layers=7, sliding_window=6, **GEMMA)
    ),
    "gemma3, every second layer full, both rotary settings": Gemma3TextConfig(
        **like_llama(3, 1, sliding_window_pattern=2, sliding_window=9, rope_parameters=GEMMA3_ROPE, **GEMMA)
    ),
    "gemma3, given layers, untied, biases, soft-capped logits": Gemma3TextConfig(
        **like_llama(4, 4, layer_types=[FULL, SLIDING], sliding_window=5, attention_bias=True, **GEMMA)
        | {"tie_word_embeddings": False, "final_logit_softcapping": 3.0}
    ),
    "gemma3, all layers full, wide heads": Gemma3TextConfig(
        **like_llama(2, 2, layer_types=[FULL] * 2, **GEMMA | {"head_dim": 32})
    ),
    "neox, in parallel": GPTNeoXConfig(**like_neox(4, rotary_pct=0.25)),
    "neox, one after the other, whole rotary": GPTNeoXConfig(**like_neox(3, rotary_pct=1.0, **SEQUENTIAL)),
    "neox, tanh, no bias of attention, tied": GPTNeoXConfig(
        **like_neox(2, rotary_pct=0.5, hidden_act="gelu_fast", attention_bias=False, tie_word_embeddings=True)
    ),
    "gpt2, tied": GPT2Config(**like_gpt2(4)),
    "gpt2, untied, own width, three layers": GPT2Config(
        **like_gpt2(3, n_inner=100, n_layer=3, tie_word_embeddings=False)
    ),
    "gpt2, scores divided by the number of the layer": GPT2Config(
        **like_gpt2(2, scale_attn_by_inverse_layer_idx=True, reorder_and_upcast_attn=True)
    ),
    "gpt2, scores not scaled, erf, other eps": GPT2Config(
        **like_gpt2(4, scale_attn_weights=False, activation_function="gelu", layer_norm_epsilon=1e-2)
    ),
    "gpt_neo, full and local in turns": GPTNeoConfig(
        **like_neo(4, ["global", "local"], 7, num_layers=4, attention_types=[[["global", "local"], 2]])
    ),
    "gpt_neo, untied, own width": GPTNeoConfig(
        **like_neo(3, ["local", "global"], 2, tie_word_embeddings=False, intermediate_size=100)
    ),
    "gpt_neo, local alone, erf, other eps": GPTNeoConfig(
        **like_neo(4, ["local"] * 2, 16, activation_function="gelu", layer_norm_epsilon=1e-2)
    ),
}
