"""Save levels of blocks: the saved bytes, the matmuls that backward recomputes, and unchanged gradients."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoConfig,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    Olmo2Config,
    Qwen3Config,
)

from octavo import adapters
from octavo.adapters import AdapterPlan
from octavo.fused.loss import cross_entropy_sum
from octavo.layers.context import ForwardOptions, Save
from octavo.layers.dropout import Dropout
from octavo.layers.fused_linear import FusedLinear
from octavo.layers.gemm_input import GemmInput
from octavo.layers.lora import LoraSpec
from octavo.models import Decoder, weight_entries
from octavo.models.fused_blocks import FUSED
from octavo.ops.attention import find_documents
from octavo.ops.quantize import scheme_named
from octavo.ops.scheme import Scheme
from octavo.store.contents import scheme_at
from octavo.store.weights import allocated

VOCABULARY, LENGTH, LAYERS, WIDTH, MLP_WIDTH = 61, 48, 4, 32, 64
LIKE_LLAMA: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": MLP_WIDTH, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
}  # fmt: skip
GROUPED = LIKE_LLAMA | {"num_key_value_heads": 2}
CONFIGS = {
    "llama": LlamaConfig(**GROUPED),
    "gptj": GPTJConfig(vocab_size=VOCABULARY, n_embd=WIDTH, n_inner=MLP_WIDTH, n_layer=LAYERS, n_head=4, rotary_dim=4),
    "gpt_neox": GPTNeoXConfig(**LIKE_LLAMA),
    "gpt_neox, one after the other": GPTNeoXConfig(**LIKE_LLAMA, use_parallel_residual=False),
    "gpt_neo": GPTNeoConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=MLP_WIDTH, num_layers=LAYERS, num_heads=4,
        attention_types=[[["global"], LAYERS]], max_position_embeddings=64,
    ),
    "gpt2": GPT2Config(
        vocab_size=VOCABULARY, n_embd=WIDTH, n_inner=MLP_WIDTH, n_layer=LAYERS, n_head=4, n_positions=64,
        scale_attn_by_inverse_layer_idx=True,
    ),
    "gemma2": Gemma2Config(**GROUPED, head_dim=8, attn_logit_softcapping=None, sliding_window=64, pad_token_id=None),
    "gemma3": Gemma3TextConfig(**GROUPED, head_dim=8, sliding_window=64, pad_token_id=None),
    "granite": GraniteConfig(**GROUPED, residual_multiplier=0.4),
    "qwen3": Qwen3Config(**GROUPED, head_dim=8),
    "olmo2": Olmo2Config(**GROUPED, eos_token_id=2, pad_token_id=None),
}  # fmt: skip


class Saved(NamedTuple):
    """What a block saves, in values a token."""

    lora: int  # x A^T of its adapters of rank 4, and a one for a bias; for each matmul padded to a multiple of 8
    inputs: int = 2 * WIDTH  # of the branches
    u: int = 2 * WIDTH + 2 * MLP_WIDTH
    attention: int = 3 * WIDTH + 4  # output, log-sums; on a CPU shared heads are repeated, and the copies are saved
    post_norms: int = 0  # their inputs


ALL_HEADS = WIDTH + 4
SAVED = {
    "llama": Saved(40),
    "gptj": Saved(40, WIDTH, 3 * WIDTH + MLP_WIDTH, ALL_HEADS),
    "gpt_neox": Saved(32, WIDTH, 3 * WIDTH + MLP_WIDTH, ALL_HEADS),  # its branches have one input
    "gpt_neox, one after the other": Saved(32, 2 * WIDTH, 3 * WIDTH + MLP_WIDTH, ALL_HEADS),
    "gpt_neo": Saved(40, 2 * WIDTH, 3 * WIDTH + MLP_WIDTH, ALL_HEADS),
    "gpt2": Saved(32, 2 * WIDTH, 3 * WIDTH + MLP_WIDTH, ALL_HEADS),
    "gemma2": Saved(40, post_norms=2 * WIDTH),
    "gemma3": Saved(40, post_norms=2 * WIDTH),
    "granite": Saved(40),
    "qwen3": Saved(40),
    "olmo2": Saved(40, post_norms=2 * WIDTH),
}
MIXED = [Save.INPUT, Save.ALL, Save.ATTENTION, Save.INPUT]

SavedBy = Callable[[Callable[[], Tensor]], tuple[Tensor, int]]


@pytest.fixture(scope="module", params=CONFIGS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(name: str, models_of: Callable[[Any], tuple[Any, Decoder]]) -> Decoder:
    _, ours = models_of(CONFIGS[name])
    assert type(ours.blocks[0]) in FUSED
    adapters.create_(ours, AdapterPlan(LoraSpec(rank=4, alpha=8, dropout=0.3)), seed=0)
    for parameter in adapters.trained(ours).values():
        nn.init.normal_(parameter, std=0.1)
    return ours.train()


def loss_of(model: Decoder, save: Save | Sequence[Save], *, packed: bool = True, offload: bool = False) -> Tensor:
    torch.manual_seed(5)  # of the dropout
    generator = torch.Generator().manual_seed(1)
    ids, labels = (torch.randint(VOCABULARY, (2, LENGTH), generator=generator) for _ in range(2))
    document = torch.arange(LENGTH).expand(2, LENGTH) // 20 if packed else None
    options = ForwardOptions(save, offload)
    hidden = model.hidden(ids, documents=find_documents(document, ids.device), options=options)
    return cross_entropy_sum(hidden.flatten(0, 1), labels.flatten(), FusedLinear((model.head.spec(),)), Dropout())


def gradients(model: Decoder, save: Save | Sequence[Save], *, offload: bool = False) -> dict[str, Tensor]:
    model.zero_grad()
    torch.autograd.backward(loss_of(model, save, offload=offload))
    trained = adapters.trained(model)
    found = {name: p.grad.clone() for name, p in trained.items() if p.grad is not None}
    assert found.keys() == trained.keys()
    return found


@pytest.mark.parametrize("save", [Save.INPUT, Save.ATTENTION, MIXED], ids=str)
def test_gradients_are_the_same_to_the_bit_with_dropout_on(model: Decoder, save: Save | Sequence[Save]) -> None:
    kept, again = gradients(model, Save.ALL), gradients(model, save)
    assert all(torch.equal(gradient, again[name]) for name, gradient in kept.items())
    assert all(gradient.any() for gradient in kept.values())


def test_offload_changes_no_bit(model: Decoder) -> None:
    kept, again = gradients(model, MIXED), gradients(model, MIXED, offload=True)
    assert all(torch.equal(gradient, again[name]) for name, gradient in kept.items())


def test_dropout_is_on_in_what_is_compared(model: Decoder) -> None:
    quiet = copy.deepcopy(model).eval()
    assert not torch.equal(loss_of(model, Save.ALL), loss_of(quiet, Save.ALL))


@pytest.mark.parametrize(("save", "again"), [(Save.ALL, 0), (Save.ATTENTION, 4), (Save.INPUT, 4), (MIXED, 3)], ids=str)
def test_only_the_first_matmuls_of_a_branch_run_again_in_backward(
    name: str, model: Decoder, save: Save | Sequence[Save], again: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And with a norm of its result the other one, where that is not saved."""
    ran: Counter[str] = Counter()
    matmul = FusedLinear.matmul

    def noted(self: FusedLinear, gemm_input: GemmInput, *, residual: Tensor | None = None) -> Tensor:
        first = self.parts[0].rows > WIDTH  # the second one of a branch has d outputs
        ran["first" if first else "second"] += 1
        return matmul(self, gemm_input, residual=residual)

    monkeypatch.setattr(FusedLinear, "matmul", noted)
    branches = 1 if name == "gptj" else 2
    loss = loss_of(model, save)
    assert ran == {"first": branches * LAYERS, "second": branches * LAYERS}
    ran.clear()
    torch.autograd.backward(loss)
    inputs_alone = [save] * LAYERS if isinstance(save, Save) else save
    second = branches * inputs_alone.count(Save.INPUT) if SAVED[name].post_norms else 0
    assert ran == Counter({"first": branches * again, "second": second})


def test_the_saved_bytes_are_those_of_the_save_level(name: str, model: Decoder, saved_by: SavedBy) -> None:
    row = 2 * LENGTH * 4  # bytes of one value a token
    saved_bytes = {save: saved_by(partial(loss_of, model, save, packed=False))[1] / row for save in Save}
    saved = SAVED[name]
    # In addition: the input of the last norm, the tensors that this norm saves, the head's gradient, the rotary table.
    inputs = LAYERS * (saved.inputs + saved.lora)
    assert inputs <= saved_bytes[Save.INPUT] <= inputs + 4 * WIDTH
    attention = LAYERS * (saved.attention + saved.post_norms)
    assert saved_bytes[Save.ATTENTION] - saved_bytes[Save.INPUT] == attention
    assert saved_bytes[Save.ALL] - saved_bytes[Save.ATTENTION] == LAYERS * saved.u


@torch.no_grad()
def test_without_gradients_nothing_is_computed_again(model: Decoder) -> None:
    torch.testing.assert_close(loss_of(model, Save.INPUT), loss_of(model, Save.ALL), rtol=0, atol=0)


def test_without_gradients_nothing_is_saved(model: Decoder, saved_by: SavedBy) -> None:
    with torch.no_grad():
        _, saved_bytes = saved_by(lambda: loss_of(model, Save.ALL))
    assert saved_bytes == 0


def test_too_few_levels_are_an_error(model: Decoder) -> None:
    with pytest.raises(ValueError, match="shorter"):
        loss_of(model, MIXED[:-1])


@pytest.mark.parametrize("scheme", ["none", "int8", "nf4"])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
def test_no_result_depends_on_uninitialized_memory(
    scheme: str, precision: torch.dtype, fused: bool, poisoned_memory: None
) -> None:
    # Widths that are no multiple of 32: there a bfloat16 matmul of oneDNN reads past the K columns of a row.
    config = {
        "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": 80, "intermediate_size": 176,
        "num_hidden_layers": 2, "num_attention_heads": 5, "num_key_value_heads": 1,
    }  # fmt: skip
    model = allocated(config, scheme_named(scheme), dtype=precision, device=torch.device("cpu"))
    fill_randomly_(model, scheme_named(scheme))
    adapters.create_(model, AdapterPlan(LoraSpec(rank=4, alpha=8)), seed=0)
    model.train()
    ids = torch.arange(2 * LENGTH).view(2, LENGTH) % VOCABULARY
    hidden = model.hidden(ids, options=ForwardOptions(Save.ATTENTION, fused=fused))
    head = FusedLinear((model.head.spec(),))
    loss = cross_entropy_sum(hidden.flatten(0, 1), ids.flatten(), head, Dropout())
    torch.autograd.backward(loss)
    assert loss.isfinite()
    for name, parameter in adapters.trained(model).items():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all(), name


def fill_randomly_(model: Decoder, scheme: Scheme) -> None:
    generator = torch.Generator().manual_seed(0)
    for entry in weight_entries(model).values():
        if entry.matrix is not None:
            shape = entry.matrix.outputs[entry.rows_key], entry.matrix.in_features
            weight = torch.randn(shape, generator=generator) * 0.1
            entry.matrix.put(entry.rows_key, scheme_at(entry, scheme).quantize(weight))
        else:
            for parameter in entry.layer.parameters():
                nn.init.ones_(parameter)
