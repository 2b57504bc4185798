"""Gemma 2 and 3 beyond the parity test: what their config.json says, soft-capped logits, and rounding in bfloat16."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.models.families import FULL, GEMMA, GEMMA3_ROPE, LENGTH, SLIDING, VOCABULARY, like_llama
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma3TextConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding

from octavo.data.loader import Batch
from octavo.data.packing import IGNORE_INDEX
from octavo.errors import ModelError
from octavo.models import Decoder, build, gemma2, gemma3, parse
from octavo.models.unread_keys import unread_keys
from octavo.objective import batch_loss
from octavo.ops.quantize import scheme_named
from octavo.ops.tiles import Phase
from octavo.store.sources import FolderSource
from octavo.store.weights import load

# The language model in google/gemma-3-4b-it's config.json, and google/gemma-3-270m's layers.
GEMMA3_4B: dict[str, Any] = {
    "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
}  # fmt: skip
CONFIGS = {
    "gemma2": Gemma2Config(
        **like_llama(4, 2, sliding_window=6, hidden_size=56, **GEMMA, attn_implementation="eager"),
        attn_logit_softcapping=2.0,
        final_logit_softcapping=2.5,
    ),
    "gemma3": Gemma3TextConfig(
        **like_llama(4, 2, sliding_window=6, hidden_size=56, sliding_window_pattern=2, **GEMMA),
        final_logit_softcapping=2.5,
    ),
}


@pytest.fixture(scope="module", params=CONFIGS)
def models(request: pytest.FixtureRequest, models_of: Callable[[Any], tuple[Any, Decoder]]) -> tuple[Any, Decoder]:
    return models_of(CONFIGS[request.param])


def some_ids() -> Tensor:
    return torch.randint(VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(3))


def test_absent_keys_have_the_values_of_transformers() -> None:
    """The released file has neither the number of heads nor that of tokens, and no 'architectures'."""
    parsed = parse(GEMMA3_4B)
    assert isinstance(parsed, gemma3.Config)
    theirs = Gemma3TextConfig(**GEMMA3_4B)
    assert (parsed.vocabulary, parsed.heads, parsed.key_value_heads) == (262_208, 8, 4)
    assert (parsed.head_size, parsed.context, parsed.tied) == (256, 131_072, True)
    assert [layer.spec.window for layer in parsed.attention] == [
        1024 if kind == SLIDING else None for kind in theirs.layer_types
    ]
    assert {layer.spec.scale for layer in parsed.attention} == {1 / 16}
    assert {layer.spec.softcap for layer in parsed.attention} == {parsed.logit_softcap} == {None}
    defaults = parse({"model_type": "gemma2"})
    assert isinstance(defaults, gemma2.Config)
    assert (defaults.vocabulary, defaults.layers, defaults.width, defaults.mlp_width) == (256_000, 26, 2304, 9216)
    assert (defaults.context, defaults.logit_softcap, defaults.embedding_scale) == (8192, 30.0, 48.0)
    assert [layer.spec.window for layer in defaults.attention] == [4096, None] * 13
    assert {layer.spec.softcap for layer in defaults.attention} == {50.0}


def test_all_keys_of_the_released_files_are_read() -> None:
    one_name_more = {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}
    assert unread_keys({"model_type": "gemma2", **one_name_more, **gemma2.DEFAULTS}, parse) == []
    for case in ("released files", "of each type of layers"):
        config = {**GEMMA3_4B, "rope_scaling": None, "sliding_window_pattern": 6, **ROPES[case]}
        assert unread_keys(config, parse) == []


ROPES: dict[str, dict[str, Any]] = {
    "none given": {},
    "released files": {"rope_theta": 5e5, "rope_local_base_freq": 2e3, "rope_scaling": GEMMA3_4B["rope_scaling"]},
    "of each type of layers": {"rope_parameters": GEMMA3_ROPE},
    "of one type of layers": {"rope_parameters": {FULL: GEMMA3_ROPE[FULL]}},
    "rope_scaling wins": {"rope_parameters": GEMMA3_ROPE, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "a base outside": {"rope_parameters": {FULL: {"rope_type": "default"}}, "rope_theta": 3e4},
}


@pytest.mark.parametrize("case", ROPES)
def test_rotary_settings_are_read_as_in_transformers(case: str) -> None:
    config = {**GEMMA3_4B, "num_hidden_layers": 6, "head_dim": 64, "rope_scaling": None, **ROPES[case]}
    theirs = Gemma3RotaryEmbedding(Gemma3TextConfig(**config))
    attention = parse(config).attention
    for layer, kind in ((0, SLIDING), (5, FULL)):
        rotary = attention[layer].rotary
        assert rotary is not None
        expected = getattr(theirs, f"{kind}_inv_freq")
        torch.testing.assert_close(torch.tensor(rotary.frequencies), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("key", ["layer_types", "sliding_window_pattern"])
def test_sliding_layers_are_given_by_a_list_or_a_pattern(key: str) -> None:
    value = [FULL, SLIDING, SLIDING, FULL] if key == "layer_types" else 3
    config = {**GEMMA3_4B, "num_hidden_layers": 4, key: value}
    kinds = Gemma3TextConfig(**config).layer_types
    windows = [layer.spec.window for layer in parse(config).attention]
    assert windows == [1024 if kind == SLIDING else None for kind in kinds]


REFUSED = {
    "use_bidirectional_attention": ("gemma3_text", True),
    "hidden_activation": ("gemma2", "relu"),
    "attn_logit_softcapping": ("gemma3_text", 50.0),
    "final_logit_softcapping": ("gemma2", -1.0),
    "query_pre_attn_scalar": ("gemma2", 0),
    "sliding_window_pattern": ("gemma3_text", 0),
    "rope_parameters": ("gemma3_text", {"rope_type": "linear", "factor": 8.0}),
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_is_not_computed_is_refused_by_name(key: str) -> None:
    model_type, value = REFUSED[key]
    with pytest.raises(ModelError) as caught:
        build({"model_type": model_type, key: value})
    assert key in caught.value.message or "activation 'relu'" in caught.value.message


@torch.no_grad()
def test_all_logits_are_soft_capped(models: tuple[Any, Decoder]) -> None:
    theirs, ours = models
    ids = some_ids()
    expected, hidden = theirs(ids).logits, ours.hidden(ids)
    softcap = ours.config.logit_softcap
    assert softcap is not None
    assert expected.abs().max() > 0.9 * softcap
    torch.testing.assert_close(ours.logits(hidden), expected, rtol=0, atol=1e-5)
    for phase in (Phase.PREFILL, Phase.DECODE):
        torch.testing.assert_close(ours.infer_logits(hidden, phase), expected, rtol=0, atol=1e-5)
    together = ours.infer_logits(hidden, Phase.DECODE)
    for at in range(LENGTH):  # a row has the same bits alone
        assert torch.equal(ours.infer_logits(hidden[:1, at, None], Phase.DECODE)[0, 0], together[0, at])


@torch.no_grad()
def test_the_loss_is_that_of_the_soft_capped_logits(models: tuple[Any, Decoder]) -> None:
    theirs, ours = models
    ids = some_ids()
    labels = ids.roll(-1, dims=1)
    labels[:, -1] = IGNORE_INDEX
    rows = torch.arange(2)[:, None].expand(ids.shape)
    batch = Batch(ids, labels, torch.arange(LENGTH).repeat(2, 1), rows, (("f:1",),) * 2, epoch=0, index=0)
    expected = F.cross_entropy(theirs(ids).logits.flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(batch_loss(ours, batch), expected, rtol=1e-5, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("case", CONFIGS)
def test_bfloat16_rounds_as_transformers_does(case: str, tmp_path: Path) -> None:
    """The embedding's scale, 7.4833 for a width of 56, is 7.5 in bfloat16; 1 + weight is not rounded."""
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(CONFIGS[case], dtype=torch.bfloat16).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    theirs.save_pretrained(tmp_path)
    ours = load(FolderSource(tmp_path), scheme_named("none"), dtype=torch.bfloat16, device=torch.device("cpu"))
    ids = some_ids()
    inputs: list[Tensor] = []
    hook = ours.blocks[0].register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    ours.hidden(ids, cache=ours.new_cache(batch=2, max_len=LENGTH))  # with a cache no block is fused
    hook.remove()
    x = theirs.model.embed_tokens(ids)
    assert torch.equal(inputs[0], x)
    assert torch.equal(ours.get_submodule("blocks.0.norm_1")(x), theirs.model.layers[0].input_layernorm(x))
    expected, actual = theirs(ids).logits.float(), ours(ids).float()
    exact = load(FolderSource(tmp_path), scheme_named("none"), dtype=torch.float32, device=torch.device("cpu"))(ids)
    error, of_theirs = (actual - exact).norm() / exact.norm(), (expected - exact).norm() / exact.norm()
    assert error < 1.5 * of_theirs + 1e-3
    assert of_theirs < 0.1
