"""How a step is fitted into memory: what each block saves, and how many rows go through the model at once.

Before weights are read, candidate plans are simulated (train/simulate.py), and the one with the shortest step within
the budget is chosen. If a GPU runs out of memory all the same, a plan for less memory follows.

Legend: rows are the sequences of a micro-batch; an optimizer step runs `batch_size` rows in several micro-batches,
whose gradients add up to the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from octavo.hardware import GPUS, Peak
from octavo.layers.context import ForwardOptions, Save
from octavo.models import Decoder
from octavo.objective import Inputs, Objective, next_token_loss
from octavo.ops.attention import Documents
from octavo.runtime.dispatch import simulated_gpu
from octavo.runtime.offload import pinned_bytes
from octavo.train.precision import Precision, matmul8_of, transposed_bytes
from octavo.train.simulate import Forecast, simulate

# Device memory beyond the forecast of a step: cuBLAS's four workspaces (runtime/capture.py: of two threads, for eager
# steps and for captures; 32 MiB each on Hopper, 8 MiB elsewhere) and what the allocator still holds of the eager step.
WORKSPACE_BYTES = 160 * 2**20
OFFLOAD_FACTOR = 1.02  # of the forecast time with offload: a plan within 11 GiB that was to save 1.3 % saved nothing
MARGIN = 0.98  # share of the budget that plans may use: the error of the forecast


@dataclass(frozen=True)
class MemoryPlan:
    """What each block saves, rows of a micro-batch, and the forecast: peak device memory, seconds of an optimizer step.

    With `offload` the blocks' inputs and the embedding are in `host_bytes` of CPU memory. The weights of
    8-bit matmuls of the last `transposed` layers are stored transposed as well. With `tiled_head` the head is
    dequantized in tiles (fused/loss.py). `large_bytes` of the peak are the step's blocks of over 1 MiB.
    """

    save: tuple[Save, ...]
    rows: int
    peak_bytes: int
    seconds: float | None  # the middle of the range; None: the GPU's peak throughput is unknown
    offload: bool = False
    host_bytes: int = 0
    transposed: int = 0
    tiled_head: bool = False
    large_bytes: int = 0
    seconds_range: tuple[float, float] | None = None  # the shortest and the longest time

    def describe(self) -> str:
        """For people: rows of a micro-batch, and what is saved in how many layers."""
        names = {Save.ALL: "all activations", Save.ATTENTION: "attention's output", Save.INPUT: "the input"}
        counts = [f"{self.save.count(level)} save {names[level]}" for level in sorted(set(self.save), reverse=True)]
        offload = f"; their inputs and the embedding are in {self.host_bytes / 2**30:.2f} GiB of CPU memory"
        transposed = f"; the 8-bit weights of {self.transposed} are stored transposed too"
        return (
            f"micro-batches of {self.rows} sequence{'s' * (self.rows != 1)}, of {len(self.save)} layers "
            + ", ".join(counts)
            + self.offload * offload
            + (self.transposed > 0) * transposed
            + self.tiled_head * "; the head is dequantized in tiles"
        )


@dataclass
class Planner:
    """Finds plans for a decoder on the meta device, without weights but with its adapter."""

    model: Decoder
    length: int  # tokens of a row
    batch_size: int  # rows of an optimizer step
    optimizer_bytes: int  # of state per trained parameter
    gpu: Peak | None = None
    offloads: tuple[bool, ...] = (False,)  # whether plans may offload
    host_bytes: float = math.inf  # CPU memory that they may use
    micro_batch_size: int | None = None  # rows of a micro-batch; None: the planner chooses
    precision: Precision = field(default_factory=Precision)
    objective: Objective = next_token_loss
    fused: bool = True
    tiled_head: bool = False
    documents: int = 1  # the most documents of a row, a row's padding included
    ampere: bool = True  # whether the GPU has compute capability 8.0: FlashAttention and all kernels (simulated_gpu)
    simulated: Callable[[], None] | None = None  # called after each simulation, which may take a second
    _forecasts: dict[tuple[int, tuple[Save, ...], bool, int], Forecast] = field(init=False, default_factory=dict)

    @property
    def fixed_bytes(self) -> int:
        """Memory of the whole run: weights, norms and biases, trained parameters with gradient and optimizer state."""
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        return self.model.frozen_bytes + trained * (4 + 4 + self.optimizer_bytes)

    def fixed(self, save: Sequence[Save], budget_bytes: float) -> MemoryPlan:
        """The plan with given save levels and the most rows that fit; the smallest one if none fits."""
        plans: list[MemoryPlan] = []
        for rows in self.row_counts:
            plans = self._able([self.plan(save, rows, offload=offload) for offload in self.offloads])
            fitting = [plan for plan in plans if plan.peak_bytes <= budget_bytes]
            if fitting:
                return fitting[0]
        return min(plans, key=lambda plan: plan.peak_bytes)

    @property
    def row_counts(self) -> list[int]:
        """The candidates for the rows of a micro-batch, the largest first."""
        return list(_halvings(self.batch_size)) if self.micro_batch_size is None else [self.micro_batch_size]

    def plan(self, save: Sequence[Save], rows: int, *, offload: bool = False, transposed: int = 0) -> MemoryPlan:
        """One plan, forecast."""
        forecast = self._forecast(rows, tuple(save), offload, transposed)
        micro_batches = math.ceil(self.batch_size / rows)
        seconds, seconds_range = None, None
        if self.gpu is not None:
            low, high = forecast.seconds_range(self.gpu)
            seconds = forecast.seconds(self.gpu) * micro_batches
            seconds_range = low * micro_batches, high * micro_batches
        table = self.model.untied_embedding.weight_bytes if offload and self.model.untied_embedding is not None else 0
        weights = self.fixed_bytes - table + transposed_bytes(self.model, self.precision, transposed)
        peak = weights + forecast.peak_bytes + WORKSPACE_BYTES
        return MemoryPlan(
            tuple(save), rows, peak, seconds, offload, pinned_bytes(table) + forecast.host_bytes, transposed,
            self.tiled_head, forecast.large_bytes, seconds_range,
        )  # fmt: skip

    @cached_property
    def least(self) -> Planner:
        """The planner of plans whose head is dequantized in tiles: the same step is slower, with less memory."""
        return replace(self, tiled_head=True)

    def best(self, budget_bytes: float) -> MemoryPlan | None:
        """The plan with the shortest step within the budget; None if there is none."""
        found = self._best(budget_bytes)
        full = found is not None and found.save == self._all(Save.ALL) and found.rows == self.row_counts[0]
        full = full and found is not None and not found.offload
        if self.tiled_head or full or self.smallest().peak_bytes > MARGIN * budget_bytes:
            return found
        plans = [plan for plan in (found, self.least._best(budget_bytes)) if plan is not None]
        return min(plans, key=self._cost, default=None)

    def _best(self, budget_bytes: float) -> MemoryPlan | None:
        fitting: list[MemoryPlan] = []
        limit, transposes = MARGIN * budget_bytes, bool(self.precision.outliers) and not self.precision.forward_only
        for rows in self.row_counts:
            for offload in self.offloads:
                plan = self._fullest(rows, limit, offload)
                if plan is None:
                    continue
                fitting.append(plan)
                if plan.save == self._all(Save.ALL):
                    stored = self._transposed(plan, limit) if transposes else plan
                    fitting.append(stored)
                    # The fastest of all: fewer rows are slower, unless they divide the batch and these do not.
                    divides = rows * math.ceil(self.batch_size / rows) == self.batch_size
                    if divides and not offload and (not transposes or stored.transposed == len(plan.save)):
                        return min(fitting, key=self._cost)
                    break  # offload is slower; with fewer rows more of the transposed weights may fit
            # Each row count takes three simulations an offload mode: one more spares those of a run that cannot fit.
            if not fitting and rows == self.row_counts[0] and self.smallest().peak_bytes > limit:
                return None
        return min(fitting, key=self._cost, default=None)

    def _transposed(self, plan: MemoryPlan, limit: float) -> MemoryPlan:
        """The plan, in which every layer keeps all, with the transposed weights of as many layers as fit."""
        layers = 0 if plan.offload else len(plan.save)
        each = transposed_bytes(self.model, self.precision, len(plan.save)) / len(plan.save)
        # One more than fits by these bytes: with all layers, a step needs no memory for a transposition.
        for count in range(int(min(layers, (limit - plan.peak_bytes) / each + 1)), 0, -1):  # the limit may be infinite
            stored = self.plan(plan.save, plan.rows, transposed=count)
            if stored.peak_bytes <= limit:
                return stored
        return plan

    def smallest(self) -> MemoryPlan:
        """The plan with the least device memory, within the CPU memory."""
        if not self.tiled_head:
            return self.least.smallest()
        rows = self.row_counts[-1]
        plans = [self.plan(self._all(Save.INPUT), rows, offload=offload) for offload in self.offloads]
        return min(self._able(plans), key=lambda plan: plan.peak_bytes)

    def _able(self, plans: list[MemoryPlan]) -> list[MemoryPlan]:
        """The plans that fit CPU memory; all, if none does."""
        return [plan for plan in plans if plan.host_bytes <= self.host_bytes] or plans

    def _fullest(self, rows: int, limit: float, offload: bool) -> MemoryPlan | None:
        """The fastest plan with `rows` rows: the last layers, whose backward comes first, save more."""
        full = self.plan(self._all(Save.ALL), rows, offload=offload)
        if full.host_bytes > self.host_bytes:
            return None
        if full.peak_bytes <= limit:
            return full
        lean = self.plan(self._all(Save.INPUT), rows, offload=offload)
        if lean.peak_bytes > limit:
            return None
        middle = self.plan(self._all(Save.ATTENTION), rows, offload=offload)
        # Attention's output first, if it saves more time per byte than all activations of a layer.
        if middle.peak_bytes < full.peak_bytes and self._worth(lean, middle) > self._worth(lean, full):
            if middle.peak_bytes > limit:
                stride = max(1, len(lean.save) // 8)  # few bytes per layer
                plans = [self._between(lean, middle, limit, stride), self._between(lean, full, limit)]
                return min(plans, key=self._cost)
            lean = middle
        return self._between(lean, full, limit)

    def _between(self, low: MemoryPlan, high: MemoryPlan, limit: float, stride: int = 1) -> MemoryPlan:
        """The most layers with the save levels of `high`, the others with those of `low`, which fits.

        Counts down from a guess in steps of `stride` layers, so that a larger limit never gives fewer.
        """
        layers = len(low.save)
        guess = min(layers - 1, int(layers * (limit - low.peak_bytes) / (high.peak_bytes - low.peak_bytes)) + 1)
        for count in range(guess - guess % stride, 0, -stride):
            plan = self.plan(low.save[count:] + high.save[:count], low.rows, offload=low.offload)
            if plan.peak_bytes <= limit:
                return plan
        return low

    def _worth(self, low: MemoryPlan, high: MemoryPlan) -> float:
        """Seconds saved per additional byte."""
        return (self._seconds(low) - self._seconds(high)) / max(1, high.peak_bytes - low.peak_bytes)

    def _all(self, level: Save) -> tuple[Save, ...]:
        return (level,) * len(self.model.blocks)

    def _cost(self, plan: MemoryPlan) -> float:
        """Plans are chosen by this: offload only if it is certainly faster."""
        return self._seconds(plan) * (OFFLOAD_FACTOR if plan.offload else 1)

    def _seconds(self, plan: MemoryPlan) -> float:
        """Seconds of an optimizer step; for an unknown GPU, those on an RTX 3090."""
        if plan.seconds is not None:
            return plan.seconds
        if plan.tiled_head != self.tiled_head:
            return self.least._seconds(plan)
        forecast = self._forecast(plan.rows, plan.save, plan.offload, plan.transposed)
        return forecast.seconds(GPUS["RTX 3090"]) * math.ceil(self.batch_size / plan.rows)

    def _forecast(self, rows: int, save: tuple[Save, ...], offload: bool = False, transposed: int = 0) -> Forecast:
        key = rows, save, offload, transposed
        if key not in self._forecasts:
            matmul8 = matmul8_of(self.model, self.precision, transposed=transposed)
            options = ForwardOptions(save, offload, matmul8, fused=self.fused, tiled_head=self.tiled_head)
            with simulated_gpu(ampere=self.ampere):
                self._forecasts[key] = simulate(self._step(rows, options))
            if self.simulated is not None:
                self.simulated()
        return self._forecasts[key]

    def _step(self, rows: int, options: ForwardOptions) -> Callable[[], None]:
        ids = torch.zeros(rows, self.length, dtype=torch.int64, device="meta")  # (B, T)
        documents = None
        if slots := most_documents(rows, self.documents):  # a graph has no more of them
            offsets = torch.zeros(slots + 1, dtype=torch.int32, device="meta")  # (slots + 1,)
            documents = Documents(ids, offsets, self.length)
        inputs = Inputs(ids, ids, ids.flatten(), None, documents)
        return lambda: self.objective(self.model, inputs, options).backward()


def most_documents(rows: int, documents: int) -> int:
    """The most documents of a micro-batch, if a row has up to `documents`. 0 if each row is one document."""
    return rows * documents if documents > 1 else 0


def document_slots(documents: int, most: int | None = None) -> int:
    """The document slots of a CUDA graph for a micro-batch of packed rows: 64, 128, 256, .., so that few graphs serve
    all. 0 for rows of one document each.

    Slots without a document take memory too, so there are no more than `most`, the most documents of a micro-batch.
    """
    if not documents:
        return 0
    slots = max(64, 1 << (documents - 1).bit_length())
    return slots if most is None else max(documents, min(slots, most))


def _halvings(batch: int) -> Iterator[int]:
    """batch, its half rounded up, .. 1."""
    yield batch
    while batch > 1:
        batch = -(-batch // 2)
        yield batch
