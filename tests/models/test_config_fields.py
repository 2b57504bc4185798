"""config.json is untrusted: every field has a type and bounds, and the family is found as transformers finds it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPTJConfig, LlamaConfig, MistralConfig, Qwen2Config

from octavo.errors import ModelError
from octavo.models import build, gptj, llama, parse

SIZES: dict[str, Any] = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2}
LLAMA = LlamaConfig(**SIZES, architectures=["LlamaForCausalLM"]).to_dict()
GPTJ = GPTJConfig(
    vocab_size=61, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, architectures=["GPTJForCausalLM"]
).to_dict()
WRONG_SIZES = [10**12, -4, 0, "x", None, float("nan"), float("inf"), [], {}, True, 2.5, 10**400]
REQUIRED = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


@pytest.mark.parametrize("key", REQUIRED)
@pytest.mark.parametrize("value", WRONG_SIZES, ids=lambda value: repr(value)[:20])
def test_a_size_of_a_wrong_type_or_out_of_bounds_is_named(key: str, value: Any) -> None:
    with pytest.raises(ModelError, match=rf"config\.json: {key} is ") as caught:
        build({**LLAMA, key: value})
    assert len(caught.value.message) < 400


OPTIONAL = [
    ("head_dim", 10**9), ("head_dim", 7), ("head_dim", "8"), ("num_key_value_heads", 3), ("num_key_value_heads", -1),
    ("rms_norm_eps", float("nan")), ("rms_norm_eps", float("inf")), ("rms_norm_eps", "1e-5"), ("rms_norm_eps", -1e-5),
    ("rope_theta", "nan"), ("rope_theta", 0), ("max_position_embeddings", -1), ("max_position_embeddings", 2**80),
    ("tie_word_embeddings", "yes"), ("attention_bias", 1), ("mlp_bias", []), ("hidden_act", 5),
    ("model_type", ["llama"]),
    ("architectures", "LlamaForCausalLM"), ("architectures", [1]), ("sliding_window", "x"),
    ("rope_parameters", []), ("rope_parameters", "linear"), ("rope_parameters", {"rope_type": 3}),
    ("rope_parameters", {"rope_type": "linear"}), ("rope_parameters", {"rope_type": "linear", "factor": 0}),
    ("rope_parameters", {**LLAMA3, "low_freq_factor": 4.0}), ("rope_parameters", {**LLAMA3, "factor": float("nan")}),
    ("rope_parameters", {"rope_theta": float("inf")}), ("num_hidden_layers", 10**7),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), OPTIONAL, ids=lambda value: repr(value)[:30])
def test_an_optional_field_is_checked_too(key: str, value: Any) -> None:
    config = {name: field for name, field in LLAMA.items() if name != "rope_parameters"}
    with pytest.raises(ModelError, match=r"config\.json") as caught:
        build({**config, key: value})
    assert key in caught.value.message or next(iter(value)) in caught.value.message or key.startswith("num_key")


MISTRAL = {**LLAMA, "model_type": "mistral"}
QWEN = {**LLAMA, "model_type": "qwen3", "use_sliding_window": True}


@pytest.mark.parametrize(
    ("config", "key", "value"),
    [
        (MISTRAL, "sliding_window", "x"), (MISTRAL, "sliding_window", 0), (QWEN, "use_sliding_window", "x"),
        (QWEN, "max_window_layers", -1), (QWEN, "layer_types", ["full_attention"]), (QWEN, "layer_types", "x"),
    ],
)  # fmt: skip
def test_the_fields_of_sliding_windows_are_checked(config: dict[str, Any], key: str, value: Any) -> None:
    config = {name: field for name, field in config.items() if name != "architectures"}
    with pytest.raises(ModelError, match=key):
        build({**config, key: value})


def test_another_type_of_layer_is_named() -> None:
    config = {name: field for name, field in QWEN.items() if name != "architectures"}
    layers = ["linear_attention"] * config["num_hidden_layers"]
    with pytest.raises(ModelError, match="layers of type 'linear_attention'"):
        build({**config, "layer_types": layers})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("n_embd", 33), ("n_head", 0), ("n_layer", 10**7), ("n_inner", "x"), ("rotary_dim", 3), ("rotary_dim", 10),
        ("layer_norm_epsilon", float("nan")), ("n_positions", 0), ("activation_function", None.__class__),
    ],
)  # fmt: skip
def test_gptjs_fields_are_checked(key: str, value: Any) -> None:
    with pytest.raises(ModelError, match=key):
        build({**GPTJ, key: value})


def test_long_values_are_cut() -> None:
    for change in ({"hidden_size": "x" * 10**6}, {"architectures": ["y" * 10**6]}, {"hidden_act": "z" * 10**6}):
        with pytest.raises(ModelError) as caught:
            build({**LLAMA, **change})
        assert len(str(caught.value)) < 600


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(key=st.sampled_from([*LLAMA, "head_dim", "rope_scaling", "sliding_window"]), value=JSON)
def test_whatever_a_field_holds_is_a_config_or_a_model_error(key: str, value: Any) -> None:
    try:
        parsed = parse({**LLAMA, key: value})
    except ModelError:
        return
    assert isinstance(parsed, llama.Config)


@pytest.mark.parametrize("theirs", [LlamaConfig, MistralConfig, Qwen2Config, GPTJConfig])
@pytest.mark.parametrize("written", [None, []])
def test_without_architectures_the_model_type_decides(theirs: Any, written: Any) -> None:
    config = theirs().to_dict()  # as config.save_pretrained writes it
    assert not config.get("architectures")
    parsed = parse({**config, "architectures": written})
    assert isinstance(parsed, gptj.Config if theirs is GPTJConfig else llama.Config)
    if isinstance(parsed, llama.Config):
        assert parsed.qkv_bias is (theirs is Qwen2Config)


def test_the_model_type_decides_between_supported_ones_as_in_transformers() -> None:
    biased = parse({**LLAMA, "model_type": "qwen2"})
    assert isinstance(biased, llama.Config)
    assert biased.qkv_bias
    by_name = parse({**LLAMA, "model_type": None, "architectures": ["Qwen2ForCausalLM"]})
    assert by_name == biased
    with pytest.raises(ModelError, match="gemma"):
        parse({**LLAMA, "model_type": "gemma"})


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
FACTORS = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"rope_parameters": {**YARN, "rope_theta": 1.0}}, "rope_theta"),
        ({"rope_parameters": {**FACTORS, "original_max_position_embeddings": 1}}, "original_max_position_embeddings"),
        ({"rope_parameters": {**FACTORS, "short_factor": [1.0] * 3}}, "short_factor"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}, "head_dim": 2}, "2 values of a head"),
    ],
)
def test_rotary_settings_that_have_no_frequencies_are_errors(changes: dict[str, Any], key: str) -> None:
    config = {name: value for name, value in LLAMA.items() if name not in ("rope_parameters", "rope_scaling")}
    with pytest.raises(ModelError, match=key):
        build({**config, **changes})


def test_olmo3_settings_for_no_type_of_layers_are_an_error() -> None:
    config = {**LLAMA, "model_type": "olmo3", "architectures": ["Olmo3ForCausalLM"], "rope_parameters": YARN}
    with pytest.raises(ModelError, match="neither full_attention nor sliding_attention"):
        build(config)


def test_numbers_of_rotary_positions_outside_of_their_settings_have_no_effect_in_gpt_neox() -> None:
    config = {"model_type": "gpt_neox", **SIZES, "rotary_pct": 0.5}
    plain = parse(config).attention
    assert parse({**config, "rope_theta": 77.0, "partial_rotary_factor": 0.5}).attention == plain
    assert parse({**config, "rotary_emb_base": 77.0}).attention != plain


def test_a_composite_gemma3_has_no_soft_cap() -> None:
    text = {**SIZES, "model_type": "gemma3_text", "final_logit_softcapping": 2.0}
    assert parse({"model_type": "gemma3", "text_config": text}).logit_softcap is None
    assert parse({**text, "architectures": ["Gemma3ForCausalLM"]}).logit_softcap == 2.0
