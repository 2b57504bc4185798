"""How a step is fitted into memory: what each block keeps, and how many rows go through the model at once.

A plan is found before weights are read, by rehearsing candidates (train/simulate.py): of those that fit the budget
the one with the shortest step. Where a card runs out of memory all the same, the next plan is one for less memory.

Legend: rows are those of one pass through the model; a batch of more rows goes through in several passes, whose
gradients add up to the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from octavo.hardware import GPUS, Peak
from octavo.layers.context import Save
from octavo.layers.frozen import FrozenMatrix
from octavo.models import Decoder
from octavo.objective import Inputs, loss_of
from octavo.runtime.offload import pinned_bytes
from octavo.train.precision import keep_transposed_, transposed_bytes
from octavo.train.simulate import Forecast, rehearse

# What libraries take beside tensors: workspaces of cuBLAS and cuDNN, and what the allocator cannot fill. Measured on
# an H100 as the difference to the forecast over 11 settings: 0.15 to 0.31 GiB.
WORKSPACE_BYTES = 220 * 2**20
OFFLOADING = 1.02  # times as long as forecast: within 11 GiB one that was to save 1.3 % saved nothing (docs/log.md)
MARGIN = 0.98  # of the budget is planned for: the forecast's own error


@dataclass(frozen=True)
class MemoryPlan:
    """What each block keeps, rows of a pass, and what that takes: bytes reserved at the peak, seconds a batch.

    To `offload` is to have the inputs of layers and the embedding in `host_bytes` of the host's memory. `turned`:
    weights of products in 8 bits are kept transposed as well.
    """

    save: tuple[Save, ...]
    rows: int
    peak_bytes: int
    seconds: float | None
    offload: bool = False
    host_bytes: int = 0
    transposed: bool = False

    def describe(self) -> str:
        """For people: what is kept in how many layers."""
        names = {Save.ALL: "all", Save.ATTENTION: "attention's output", Save.INPUT: "the input"}
        counts = [f"{self.save.count(level)} keep {names[level]}" for level in sorted(set(self.save), reverse=True)]
        away = f"; their inputs and the embedding in {self.host_bytes / 2**30:.2f} GiB of the host's memory"
        twice = "; weights are kept transposed as well"
        return f"of {len(self.save)} layers " + ", ".join(counts) + self.offload * away + self.transposed * twice


@dataclass
class Planner:
    """Finds plans for a model without weights (all of it on the meta device, its adapter on it)."""

    model: Decoder
    length: int
    batch: int
    optimizer_bytes: int  # of state a trained number
    card: Peak | None = None
    offloads: tuple[bool, ...] = (False,)  # what plans may do
    host_bytes: float = math.inf  # that they may take
    _forecasts: dict[tuple[int, tuple[Save, ...], bool, bool], Forecast] = field(default_factory=dict)

    @property
    def fixed_bytes(self) -> int:
        """What stands all the time: weights, norms and biases, trained numbers with gradient and optimizer state."""
        matrices = {id(m): m for m in self.model.modules() if isinstance(m, FrozenMatrix)}.values()
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        frozen = sum(p.numel() * p.itemsize for p in self.model.parameters() if not p.requires_grad)
        return sum(m.stored_bytes for m in matrices) + frozen + trained * (4 + 4 + self.optimizer_bytes)

    def asked(self, save: Sequence[Save], budget_bytes: float) -> MemoryPlan:
        """The plan for what layers are to keep, all rows at once; it offloads if it must, or fits that way alone."""
        plans = self._able([self.plan(save, self.batch, offload=offload) for offload in self.offloads])
        fitting = [plan for plan in plans if plan.peak_bytes <= budget_bytes]
        return fitting[0] if fitting else min(plans, key=lambda plan: plan.peak_bytes)

    def plan(self, save: Sequence[Save], rows: int, *, offload: bool = False, transposed: bool = False) -> MemoryPlan:
        """One plan, forecast."""
        forecast = self._forecast(rows, tuple(save), offload, transposed)
        passes = math.ceil(self.batch / rows)
        seconds = forecast.seconds(self.card) * passes if self.card else None
        table = self.model.table.weight_bytes if offload and self.model.table is not None else 0
        twice = transposed_bytes(self.model) if transposed else 0
        peak = self.fixed_bytes - table + twice + forecast.peak_bytes + WORKSPACE_BYTES
        return MemoryPlan(
            tuple(save), rows, peak, seconds, offload, pinned_bytes(table) + forecast.host_bytes, transposed
        )

    def best(self, budget_bytes: float) -> MemoryPlan | None:
        """The plan with the shortest step within the budget; None if there is none."""
        fitting: list[MemoryPlan] = []
        limit, use_8bit = MARGIN * budget_bytes, transposed_bytes(self.model) > 0
        for rows in _halvings(self.batch):
            for offload in self.offloads:
                plan = self._fullest(rows, limit, offload)
                if plan is None:
                    continue
                fitting.append(plan)
                if plan.save == self._all(Save.ALL):
                    transposed = self._turned(plan, limit) if use_8bit else []
                    fitting += transposed
                    if transposed or not use_8bit:  # fewer rows, or less on the card, could only be slower
                        return min(fitting, key=self._cost)
                    break  # fewer rows may leave room for transposed weights
        return min(fitting, key=self._cost, default=None)

    def _turned(self, plan: MemoryPlan, limit: float) -> list[MemoryPlan]:
        """The plan, in which every layer keeps all, with weights kept transposed as well, if that fits."""
        if plan.offload:
            return []
        found = self.plan(plan.save, plan.rows, transposed=True)
        return [found] if found.peak_bytes <= limit else []

    def forget(self) -> None:
        """What was forecast, since the model is computed another way."""
        self._forecasts.clear()

    def smallest(self) -> MemoryPlan:
        """The plan that takes the least memory of the card, and no more of the host's than there is."""
        plans = [self.plan(self._all(Save.INPUT), 1, offload=offload) for offload in self.offloads]
        return min(self._able(plans), key=lambda plan: plan.peak_bytes)

    def _able(self, plans: list[MemoryPlan]) -> list[MemoryPlan]:
        """Those that the host has memory for; all, if there is none."""
        return [plan for plan in plans if plan.host_bytes <= self.host_bytes] or plans

    def _fullest(self, rows: int, limit: float, offload: bool) -> MemoryPlan | None:
        """The fastest with so many rows: more kept in the last layers, whose backward comes first."""
        full = self.plan(self._all(Save.ALL), rows, offload=offload)
        if full.host_bytes > self.host_bytes:
            return None
        if full.peak_bytes <= limit:
            return full
        levels = (Save.INPUT, Save.ATTENTION)
        lean, middle = (self.plan(self._all(level), rows, offload=offload) for level in levels)
        if lean.peak_bytes > limit:
            return None
        # Attention's output first, where that saves more time for its memory than all of a layer does.
        if middle.peak_bytes < full.peak_bytes and self._worth(lean, middle) > self._worth(lean, full):
            if middle.peak_bytes > limit:
                return self._between(lean, middle, limit, stride=max(1, len(lean.save) // 8))  # a layer's is little
            lean = middle
        return self._between(lean, full, limit)

    def _between(self, low: MemoryPlan, high: MemoryPlan, limit: float, stride: int = 1) -> MemoryPlan:
        """The most layers of `high`, after those of `low` which fits; in steps of `stride` layers.

        Counts down from a guess, so that a larger limit never finds fewer.
        """
        layers = len(low.save)
        guess = min(layers - 1, int(layers * (limit - low.peak_bytes) / (high.peak_bytes - low.peak_bytes)) + 1)
        for count in range(guess - guess % stride, 0, -stride):
            plan = self.plan(low.save[count:] + high.save[:count], low.rows, offload=low.offload)
            if plan.peak_bytes <= limit:
                return plan
        return low

    def _worth(self, low: MemoryPlan, high: MemoryPlan) -> float:
        """Seconds saved for each byte more."""
        return (self._pace(low) - self._pace(high)) / max(1, high.peak_bytes - low.peak_bytes)

    def _all(self, level: Save) -> tuple[Save, ...]:
        return (level,) * len(self.model.blocks)

    def _cost(self, plan: MemoryPlan) -> float:
        """What plans are chosen by: they offload only where that is sure to be faster."""
        return self._pace(plan) * (OFFLOADING if plan.offload else 1)

    def _pace(self, plan: MemoryPlan) -> float:
        """Seconds of a batch; on a card that is not known, those of one that is."""
        if plan.seconds is not None:
            return plan.seconds
        forecast = self._forecast(plan.rows, plan.save, plan.offload, plan.transposed)
        return forecast.seconds(GPUS["RTX 3090"]) * math.ceil(self.batch / plan.rows)

    def _forecast(self, rows: int, save: tuple[Save, ...], offload: bool = False, transposed: bool = False) -> Forecast:
        asked = rows, save, offload, transposed
        if asked not in self._forecasts:
            keep_transposed_(self.model, transposed)
            self._forecasts[asked] = rehearse(_step(self.model, rows, self.length, save, offload=offload))
            keep_transposed_(self.model, False)
        return self._forecasts[asked]


def _step(model: Decoder, rows: int, length: int, save: Sequence[Save], *, offload: bool) -> Callable[[], None]:
    ids = torch.zeros(rows, length, dtype=torch.int64, device="meta")
    inputs = Inputs(ids, ids, ids.flatten(), None, None)

    def step() -> None:
        loss_of(model, inputs, save=save, offload=offload).backward()

    return step


def _halvings(batch: int) -> Iterator[int]:
    """batch, half of it rounded up, .. 1."""
    yield batch
    while batch > 1:
        batch = -(-batch // 2)
        yield batch
