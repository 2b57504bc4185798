"""Save levels of blocks: the saved bytes, the matmuls that backward recomputes, and unchanged gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPTJConfig, LlamaConfig

from octavo import adapters
from octavo.adapters import AdapterPlan
from octavo.fused.loss import cross_entropy_sum
from octavo.layers.context import ForwardOptions, Save
from octavo.layers.dropout import Dropout
from octavo.layers.fused_linear import FusedLinear
from octavo.layers.gemm_input import GemmInput
from octavo.layers.lora import LoraSpec
from octavo.models import Decoder, weight_entries
from octavo.ops.attention import find_documents
from octavo.ops.quantize import Scheme, scheme_named
from octavo.store.contents import scheme_at
from octavo.store.weights import allocated

VOCABULARY, LENGTH, LAYERS, WIDTH, MLP_WIDTH = 61, 48, 4, 32, 64
CONFIGS = {
    "llama": LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=MLP_WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
    ),
    "gptj": GPTJConfig(vocab_size=VOCABULARY, n_embd=WIDTH, n_inner=MLP_WIDTH, n_layer=LAYERS, n_head=4, rotary_dim=4),
}
MIXED = [Save.INPUT, Save.ALL, Save.ATTENTION, Save.INPUT]

SavedBy = Callable[[Callable[[], Tensor]], tuple[Tensor, int]]


@pytest.fixture(scope="module", params=CONFIGS)
def model(request: pytest.FixtureRequest, models_of: Callable[[Any], tuple[Any, Decoder]]) -> Decoder:
    _, ours = models_of(CONFIGS[request.param])
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
def test_only_the_first_matmuls_of_a_block_run_again_in_backward(
    model: Decoder, save: Save | Sequence[Save], again: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[int] = []  # K of every matmul; the first ones of a branch have K = d_model
    matmul = FusedLinear.matmul

    def noted(self: FusedLinear, gemm_input: GemmInput, *, residual: Tensor | None = None) -> Tensor:
        ran.append(self.inputs if residual is None else 0)
        return matmul(self, gemm_input, residual=residual)

    monkeypatch.setattr(FusedLinear, "matmul", noted)
    branches = 1 if hasattr(model.blocks[0], "fc_out") else 2
    loss = loss_of(model, save)
    assert ran == [WIDTH, 0] * branches * LAYERS
    ran.clear()
    torch.autograd.backward(loss)
    assert ran == [WIDTH] * branches * again


def test_the_saved_bytes_are_those_of_the_save_level(model: Decoder, saved_by: SavedBy) -> None:
    row = 2 * LENGTH * 4  # bytes of one number a token
    saved_bytes = {save: saved_by(partial(loss_of, model, save, packed=False))[1] / row for save in Save}
    gptj = hasattr(model.blocks[0], "fc_out")
    # In addition: the input of the last norm, the tensors that this norm saves, the head's gradient, the rotary table.
    lora_width = 40  # x A^T of the LoRA adapters of a layer, padded to multiples of 8
    inputs = LAYERS * ((1 if gptj else 2) * WIDTH + lora_width)
    assert inputs <= saved_bytes[Save.INPUT] <= inputs + 4 * WIDTH
    # Attention's output with a log-sum for each head; on a CPU shared heads are repeated, and these copies are saved.
    attention = LAYERS * (WIDTH + 4 + (0 if gptj else 2 * WIDTH))
    assert saved_bytes[Save.ATTENTION] - saved_bytes[Save.INPUT] == attention
    u = LAYERS * (3 * WIDTH + MLP_WIDTH if gptj else 2 * WIDTH + 2 * MLP_WIDTH)
    assert saved_bytes[Save.ALL] - saved_bytes[Save.ATTENTION] == u


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
