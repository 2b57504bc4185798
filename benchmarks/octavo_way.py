"""octavo's own rows of the benchmark: the rooms of the package put together as `octavo finetune` does."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from octavo.adapters import AdapterPlan, create_, trained
from octavo.data.loader import Batch
from octavo.data.packing import IGNORE_INDEX
from octavo.hardware import free_memory_bytes, peak, pick
from octavo.layers.lora import LoraSpec, flatten_
from octavo.models import Decoder
from octavo.ops.quantize import scheme_named
from octavo.store.contents import items_of
from octavo.store.weights import allocated, put_rows_, row_blocks
from octavo.train.loop import Trainer, gradients, train
from octavo.train.memory import MemoryPlan, Planner
from octavo.train.optim import Adam, LossScaler, OptimizerSettings, Schedule
from octavo.train.precision import all_8bit
from octavo.train.step import PlannedStep
from shapes import ALPHA, RANK, lora, shapes, weight

ADAPTER = AdapterPlan(LoraSpec(RANK, ALPHA))
MANY = 10**6  # steps of a schedule whose rate is constant


def build(
    way: str,
    model_name: str,
    *,
    seed: int,
    device: torch.device,
    tiny: bool,
    batch: int,
    seq_len: int,
    cap_bytes: int | None,
) -> Way:
    """octavo-SCHEME (none, int8, dynamic8, nf4) with the fastest plan within `cap_bytes`, or within what is free.

    octavo-SCHEME-8bit multiplies in 8 bits, all products of the blocks; else they are exact. octavo-..-card has nothing
    in the host's memory; else the plan may, where a cap makes that faster or possible. octavo-..-plain runs all blocks
    as plain PyTorch (--no-fused).
    """
    scheme, *more = way.removeprefix("octavo-").split("-")
    compute = "8bit" if "8bit" in more else "exact"
    dtype = torch.bfloat16 if device.type == "cuda" or not tiny else torch.float32
    budget = cap_bytes or free_memory_bytes(device)
    planner = planner_of(model_name, scheme, dtype=dtype, tiny=tiny, batch=batch, seq_len=seq_len)
    if device.type == "cuda" and "card" not in more:
        planner.offloads = (False, True)
    planner = replace(planner, fused="plain" not in more)
    if compute == "8bit":
        planner = replace(planner, precision=all_8bit(planner.model))
    plan = planner.best(budget) or planner.smallest()
    model = random_model(model_name, scheme, device=device, dtype=dtype, tiny=tiny, seed=seed)
    with_adapters_(model, seed=seed)
    return Way(model, plan, planner)


class Way:
    """A model that is trained by octavo's own loop, one batch at a time."""

    def __init__(self, model: Decoder, plan: MemoryPlan, planner: Planner) -> None:
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
        )
        self.trainer = Trainer(
            model, parameters, Adam(flatten_(parameters), OptimizerSettings()),
            Schedule(1e-5, MANY, kind="constant"), LossScaler(model.embed.matrix.dtype), self.micro_step, seed=0,
        )  # fmt: skip
        self._waiting: deque[Batch] = deque()
        self._steps = train(self.trainer, self._batches())

    def _batches(self) -> Iterator[Batch]:
        while self._waiting:
            yield self._waiting.popleft()

    @property
    def trainable_parameters(self) -> int:
        return sum(p.numel() for p in self.trainer.parameters.values())

    def step(self, ids: Tensor) -> Tensor:
        """One step of the loop."""
        self._waiting.append(make_batch(ids))
        self.last = next(self._steps)
        return torch.tensor(self.last.loss)

    def gradients(self, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean loss and its gradients by PEFT's names; they are zero again afterwards."""
        batch = make_batch(ids)
        self.trainer.model.train()
        losses, _ = gradients(self.trainer, batch, 1, loss_scale=1 / batch.trained_tokens)
        found = {
            f"base_model.model.{n}.weight": p.grad.clone()
            for n, p in self.trainer.parameters.items()
            if p.grad is not None
        }
        self.trainer.optimizer.zero_gradients()
        return torch.stack(losses).sum() / batch.trained_tokens, found


def planner_of(model_name: str, scheme: str, *, dtype: torch.dtype, tiny: bool, batch: int, seq_len: int) -> Planner:
    """The planner that `octavo finetune` would make for this."""
    model = allocated(shapes(model_name, tiny=tiny), scheme_named(scheme), dtype=dtype, device=torch.device("meta"))
    create_(model, ADAPTER, seed=0)
    flatten_(trained(model))
    model.train()
    return Planner(model, seq_len, batch, optimizer_bytes=2, gpu=peak(pick().name))


def random_model(name: str, scheme: str, *, device: torch.device, dtype: torch.dtype, tiny: bool, seed: int) -> Decoder:
    """The model of `shapes` with the weights that every way has, quantised one by one on the device."""
    model = allocated(shapes(name, tiny=tiny), scheme_named(scheme), dtype=dtype, device=device)
    for tensor, item in items_of(model):
        place = item.entry
        if item.is_matrix:
            assert place.matrix is not None
            shape = (place.matrix.outputs[place.rows_key], place.matrix.in_features)
            values = weight(tensor, shape, device, torch.bfloat16, seed=seed)
            own, scheme_here = place.matrix.of(place.rows_key), place.matrix.scheme
            for rows in row_blocks(shape, scheme_here):
                put_rows_(own, shape, rows, scheme_here, values[rows].to(dtype))
        else:
            target = place.parameter(item.kind)
            assert target is not None
            target.copy_(weight(tensor, tuple(target.shape), device, torch.float32, seed=seed))
    return model


def with_adapters_(model: Decoder, *, seed: int, zero_b: bool = False) -> None:
    """LoRA on every linear of the blocks, with the numbers that every way has."""
    create_(model, ADAPTER, seed=seed)
    for name, parameter in trained(model).items():
        if not (zero_b and name.endswith("lora_B")):
            peft = f"base_model.model.{name}.weight"
            parameter.data.copy_(lora(peft, tuple(parameter.shape), parameter.device, torch.float32, seed=seed))


def make_batch(ids: Tensor) -> Batch:
    """Rows of one document each: every token but the first is predicted."""
    ids = ids.cpu()
    labels = torch.full_like(ids, IGNORE_INDEX)
    labels[:, :-1] = ids[:, 1:]
    positions = torch.arange(ids.shape[1]).expand_as(ids).contiguous()
    return Batch(ids, labels, positions, torch.zeros_like(ids), (("random ids",),) * len(ids), epoch=0, index=0)
