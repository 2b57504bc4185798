"""The octavo rows of the benchmark: model, adapters, planner and loop as `octavo finetune` combines them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from measure import Setting
from octavo.adapters import AdapterPlan, create_, trained
from octavo.commands.backends import backward_8bit
from octavo.data.loader import Batch
from octavo.data.packing import IGNORE_INDEX
from octavo.hardware import free_memory_bytes, peak, pick
from octavo.layers.lora import LoraSpec, flatten_
from octavo.models import Decoder
from octavo.models.flops import model_flops
from octavo.ops.quantize import scheme_named
from octavo.store.contents import items_of
from octavo.store.weights import allocated, put_rows_, row_blocks
from octavo.train.loop import Trainer, accumulate_gradients, train
from octavo.train.memory import MemoryPlan, Planner
from octavo.train.optim import Adam, LossScaler, OptimizerSettings, Schedule
from octavo.train.precision import all_8bit
from octavo.train.step import PlannedStep
from shapes import ALPHA, RANK, lora, shapes, weight

ADAPTER = AdapterPlan(LoraSpec(RANK, ALPHA))
MAX_STEPS = 10**6  # of the constant schedule
META = torch.device("meta")


def build(
    method: str,
    model_name: str,
    *,
    seed: int,
    device: torch.device,
    tiny: bool,
    batch: int,
    seq_len: int,
    cap_bytes: int | None,
) -> TrainableOctavo:
    """octavo-SCHEME (none, int8, dynamic8, nf4, nf4-double) with the fastest plan in `cap_bytes` (None: free memory).

    octavo-SCHEME-8bit uses 8-bit matmuls in all blocks, on Turing in forward only; the others are exact.
    octavo-..-no-offload stores nothing in CPU memory; other plans may, where a cap makes that faster or necessary.
    octavo-..-plain runs all blocks as plain PyTorch (--no-fused).
    """
    scheme, *options = method.removeprefix("octavo-").replace("nf4-double", "nf4_double").split("-")
    scheme = scheme.replace("_", "-")
    dtype = torch.float32 if device.type == "cpu" and tiny else torch.bfloat16
    if device.type == "cuda":
        dtype = pick().dtype  # float16 on a GPU without bfloat16
    budget = cap_bytes or free_memory_bytes(device)
    planner = planner_of(model_name, scheme, dtype=dtype, tiny=tiny, batch=batch, seq_len=seq_len)
    if device.type == "cuda" and "offload" not in options:
        planner.offloads = (False, True)
    planner = replace(planner, fused="plain" not in options)
    if "8bit" in options:
        forward_only = not backward_8bit(pick())
        planner = replace(planner, precision=all_8bit(planner.model, forward_only=forward_only))
    plan = planner.best(budget) or planner.smallest()
    model = random_model(model_name, scheme, device=device, dtype=dtype, tiny=tiny, seed=seed)
    with_adapters_(model, seed=seed)
    return TrainableOctavo(model, plan, planner, limited=cap_bytes is not None)


class TrainableOctavo:
    """A model that octavo's training loop trains, one batch per call of `step`. `limited`: see PlannedStep."""

    def __init__(self, model: Decoder, plan: MemoryPlan, planner: Planner, *, limited: bool = False) -> None:
        parameters = trained(model)
        self.plan = plan
        self.micro_step = PlannedStep(
            model,
            plan,
            graphs=model.embed.matrix.parts["weight"].is_cuda,
            cheaper=lambda _: None,
            warn=print,
            precision=planner.precision,
            fused=planner.fused,
            documents=planner.documents,
            limited=limited,
        )
        self.trainer = Trainer(
            model, parameters, Adam(flatten_(parameters), OptimizerSettings()),
            Schedule(1e-5, MAX_STEPS, kind="constant"), LossScaler(model.embed.matrix.dtype), self.micro_step, seed=0,
        )  # fmt: skip
        self._batch_queue: deque[Batch] = deque()
        self._steps = train(self.trainer, self._batches())

    def _batches(self) -> Iterator[Batch]:
        while self._batch_queue:
            yield self._batch_queue.popleft()

    @property
    def trainable_parameters(self) -> int:
        return sum(p.numel() for p in self.trainer.parameters.values())

    def step(self, ids: Tensor, *, document: int | None = None) -> Tensor:
        """One optimizer step of the loop; the loss before the update. `document`: see `make_batch`."""
        self._batch_queue.append(make_batch(ids, document=document))
        self.last = next(self._steps)
        return torch.tensor(self.last.loss)

    def gradients(self, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """(mean loss, its gradients by PEFT's names). Zeroes the gradients afterwards."""
        batch = make_batch(ids)
        self.trainer.model.train()
        scale = self.trainer.scaler.scale  # in float16, gradients that are not scaled would round to zero
        losses, _ = accumulate_gradients(self.trainer, batch, 1, loss_scale=scale / batch.trained_tokens)
        by_name = {
            f"base_model.model.{n}.weight": p.grad / scale
            for n, p in self.trainer.parameters.items()
            if p.grad is not None
        }
        self.trainer.optimizer.zero_gradients()
        return torch.stack(losses).sum() / batch.trained_tokens, by_name


def planner_of(model_name: str, scheme: str, *, dtype: torch.dtype, tiny: bool, batch: int, seq_len: int) -> Planner:
    """The planner that `octavo finetune` creates for this setting."""
    model = allocated(shapes(model_name, tiny=tiny), scheme_named(scheme), dtype=dtype, device=torch.device("meta"))
    create_(model, ADAPTER, seed=0)
    flatten_(trained(model))
    model.train()
    hardware = pick()
    ampere = hardware.capabilities.flash_attention or not hardware.capabilities.is_gpu
    return Planner(model, seq_len, batch, optimizer_bytes=2, gpu=peak(hardware.name), ampere=ampere)


def flops_note(row: Setting, tokens_per_second: float) -> str:
    """The model TFLOP/s of a measured speed, and the shares of the head and of attention (models/flops.py)."""
    model = allocated(shapes(row.model, tiny=row.tiny), scheme_named("none"), dtype=torch.bfloat16, device=META)
    flops = model_flops(model, row.seq_len)
    head, attention = (100 * part / flops.total for part in (flops.head, flops.attention))
    return (
        f"{tokens_per_second * flops.total / 1e12:.1f} model TFLOP/s (head {head:.1f} %, attention {attention:.1f} %)"
    )


def random_model(name: str, scheme: str, *, device: torch.device, dtype: torch.dtype, tiny: bool, seed: int) -> Decoder:
    """The model of `shapes` with the weights of every method; quantizes them one by one on the device."""
    model = allocated(shapes(name, tiny=tiny), scheme_named(scheme), dtype=dtype, device=device)
    for tensor, item in items_of(model):
        entry = item.entry
        if item.is_matrix:
            assert entry.matrix is not None
            shape = (entry.matrix.outputs[entry.rows_key], entry.matrix.in_features)  # (N, K)
            values = weight(tensor, shape, device, torch.bfloat16, seed=seed)
            stored, matrix_scheme = entry.matrix.of(entry.rows_key), entry.matrix.scheme
            for rows in row_blocks(shape, matrix_scheme):
                put_rows_(stored, shape, rows, matrix_scheme, values[rows].to(dtype))
        else:
            target = entry.parameter(item.kind)
            assert target is not None
            target.copy_(weight(tensor, tuple(target.shape), device, torch.float32, seed=seed))
    return model


def with_adapters_(model: Decoder, *, seed: int, zero_b: bool = False) -> None:
    """Adds LoRA to every linear of the blocks, with the values of every method; `zero_b` leaves B at zero."""
    create_(model, ADAPTER, seed=seed)
    for name, parameter in trained(model).items():
        if not (zero_b and name.endswith("lora_B")):
            peft = f"base_model.model.{name}.weight"
            parameter.data.copy_(lora(peft, tuple(parameter.shape), parameter.device, torch.float32, seed=seed))


def make_batch(ids: Tensor, *, document: int | None = None) -> Batch:
    """A batch with one document per row, or with documents of `document` tokens. ids: (B, T).

    Every token except the first of a document is a label.
    """
    ids, length = ids.cpu(), document or ids.shape[1]
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    labels = torch.full_like(ids, IGNORE_INDEX)
    labels[:, :-1] = ids[:, 1:]
    labels[:, length - 1 :: length] = IGNORE_INDEX  # the last of each document
    piece = positions // length
    sources = (("random ids",),) * len(ids)
    return Batch(ids, labels, (positions % length).contiguous(), piece.contiguous(), sources, epoch=0, index=0)
