"""Forward and backward of one micro-batch: launched kernel by kernel, or replayed as a CUDA graph.

A step of GPT-J on 2,048 tokens is some 3,600 kernels, which a card works through in 115 ms while a host takes 320 ms
to launch them (one H100, docs/log.md). A graph is recorded once for each kind of batch and replayed with one launch.

Legend: B rows of a batch, T positions; the seed of backward is the loss scale over the step's trained tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from octavo.data.loader import Batch
from octavo.data.packing import IGNORE_INDEX
from octavo.layers.context import SaveLevels
from octavo.models import Decoder
from octavo.objective import Inputs, inputs_of, loss_of
from octavo.ops.attention import Documents, find_documents
from octavo.runtime.offload import join
from octavo.train.memory import MemoryPlan
from octavo.train.precision import keep_transposed_


class MicroStep(Protocol):
    """Adds the gradients of seed * (summed loss of a batch) to the parameters'; returns the summed loss in nats."""

    def __call__(self, batch: Batch, seed: float) -> Tensor: ...

    def release(self) -> None:
        """Gives back what memory is held between calls."""
        ...

    def reduce_memory(self) -> bool:
        """Takes less memory from now on; False if it cannot."""
        ...


@dataclass
class EagerStep:
    """Kernel by kernel, on any device."""

    model: Decoder
    save: SaveLevels
    offload: bool = False  # whether inputs of layers wait for backward in the host's memory

    def __call__(self, batch: Batch, seed: float) -> Tensor:
        loss = loss_of(self.model, inputs_of(batch, self.device), save=self.save, offload=self.offload)
        if loss.requires_grad and batch.trained_tokens:
            (loss * seed).backward()
        return loss.detach()

    @property
    def device(self) -> torch.device:
        return self.model.embed.matrix.device

    def release(self) -> None:
        if self.offload:
            join(self.device)  # of a pass that failed: memory that a copy still writes to must not be given to another

    def reduce_memory(self) -> bool:
        return False


class GraphStep:
    """As CUDA graphs: one for batches with one document a row, one for packed rows; both in one pool of memory.

    The first batch of a kind is launched, which makes libraries choose their kernels; the next one is recorded. Rows
    that a batch lacks are filled with padding, so that all batches are of one shape. No dropout: a replay would draw
    the same mask again.
    """

    def __init__(self, model: Decoder, save: SaveLevels, *, rows: int, offload: bool = False) -> None:
        self.launched = EagerStep(model, save, offload)
        self.rows = rows
        self._seen: set[int] = set()
        self._graphs: dict[int, _Graph] = {}

    def __call__(self, batch: Batch, seed: float) -> Tensor:
        documents = find_documents(batch.document, torch.device("cpu"))
        kind = _room_for(documents, missing=self.rows - len(batch.ids))
        if kind not in self._seen:
            self._seen.add(kind)
            self.release()  # a launched batch takes as much memory as the graphs hold
            return self.launched(batch, seed)
        if kind not in self._graphs:
            shape = (self.rows, batch.ids.shape[1])
            pool = next(iter(self._graphs.values())).graph.pool() if self._graphs else None
            self._graphs[kind] = _Graph(self.launched, shape, kind, pool)
        return self._graphs[kind].replay(batch, documents, seed)

    def release(self) -> None:
        """The graphs go, with the memory of their activations; they are recorded again when they are needed."""
        self.launched.release()
        if self._graphs:
            torch.cuda.synchronize()  # memory that a replay still works in must not be given back
        for graph in self._graphs.values():
            graph.graph.reset()
        self._graphs.clear()
        torch.cuda.empty_cache()

    def reduce_memory(self) -> bool:
        return False


class _Graph:
    """One recorded micro-step with the tensors that it reads and writes."""

    def __init__(self, launched: EagerStep, shape: tuple[int, int], room: int, pool: Any) -> None:
        device = launched.device
        self.ids, self.positions, self.number = (torch.zeros(shape, dtype=torch.int64, device=device) for _ in range(3))
        self.labels = torch.full((shape[0] * shape[1],), IGNORE_INDEX, dtype=torch.int64, device=device)
        self.offsets = torch.zeros(room + 1, dtype=torch.int32, device=device)
        self.seed = torch.zeros((), device=device)
        documents = Documents(self.number, self.offsets, shape[1]) if room else None
        inputs = Inputs(self.ids, self.positions, self.labels, None, documents)
        torch.cuda.empty_cache()  # what launched batches left behind would stand beside the graph's own memory
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool):
            try:
                loss = loss_of(launched.model, inputs, save=launched.save, offload=launched.offload)
                loss.backward(gradient=self.seed)
                self.loss = loss.detach()
            finally:
                join(device)  # a recording that fails and ends before all of its copies would hide what went wrong

    def replay(self, batch: Batch, documents: Documents | None, seed: float) -> Tensor:
        rows, length = self.ids.shape
        own = len(batch.ids)
        for target, source in ((self.ids, batch.ids), (self.positions, batch.positions)):
            target[:own].copy_(source.pin_memory(), non_blocking=True)
        self.labels[: own * length].copy_(batch.labels.flatten().pin_memory(), non_blocking=True)
        if own < rows:
            self.ids[own:].zero_()
            self.positions[own:].zero_()
            self.labels[own * length :].fill_(IGNORE_INDEX)
        if documents is not None:
            self.number[:own].copy_(batch.document.pin_memory(), non_blocking=True)
            # Rows that are missing are one document each; what room is left are documents of no length at the end.
            more = torch.arange(own + 1, rows + 1, dtype=torch.int32) * length
            offsets = torch.cat([documents.offsets, more])
            end = offsets.new_full((len(self.offsets) - len(offsets),), rows * length)
            self.offsets.copy_(torch.cat([offsets, end]).pin_memory(), non_blocking=True)
        self.seed.fill_(seed)
        self.graph.replay()
        return self.loss.clone()


def _room_for(documents: Documents | None, *, missing: int = 0) -> int:
    """0 for rows of one document each; else how many documents a graph makes room for: 64, 128, 256, ..

    Twice what the batch has, so that few graphs serve all batches; each of the `missing` rows is a document too.
    """
    if documents is None:
        return 0
    room = 64
    while room < 2 * (len(documents.offsets) + missing):
        room *= 2
    return room


class PlannedStep:
    """By a plan: so many rows at a time, keeping what it says. A plan that does not hold gives way to a cheaper one."""

    def __init__(
        self,
        model: Decoder,
        plan: MemoryPlan,
        *,
        record: bool,
        cheaper: Callable[[MemoryPlan], MemoryPlan | None],
        warn: Callable[[str], None],
    ) -> None:
        self.model, self.plan, self.record = model, plan, record
        self._cheaper, self._warn = cheaper, warn
        self._own = self._made()
        self._turned = False  # whether weights are kept transposed: to ask all layers would take 0.5 ms a step

    def _made(self) -> EagerStep | GraphStep:
        offload = self.plan.offload
        if self.model.table is not None:
            self.model.table.set_host_resident_(offload)
        if self.record:
            return GraphStep(self.model, self.plan.save, rows=self.plan.rows, offload=offload)
        return EagerStep(self.model, self.plan.save, offload)

    def __call__(self, batch: Batch, seed: float) -> Tensor:
        if self.plan.transposed and not self._turned:  # here, where running out of memory leads to another plan
            keep_transposed_(self.model, True)
            self._turned = True
        return torch.stack([self._own(part, seed) for part in parts_of(batch, self.plan.rows)]).sum()

    def release(self) -> None:
        self._own.release()
        keep_transposed_(self.model, False)  # after the graphs that read them
        self._turned = False

    def take(self, plan: MemoryPlan) -> None:
        """Goes on by another plan; what was held for the last one has been released."""
        self.plan = plan
        self._own = self._made()

    def reduce_memory(self) -> bool:
        """After running out of memory: the next cheaper plan. False if none is left."""
        self.release()
        plan = self._cheaper(self.plan)
        if plan is None:
            return False
        self._warn(
            f"The card ran out of memory with a plan for {self.plan.peak_bytes / 2**30:.2f} GiB. Going on with one for "
            f"{plan.peak_bytes / 2**30:.2f} GiB: {plan.rows} rows a pass, {plan.describe()}."
        )
        self.take(plan)
        return True


def parts_of(batch: Batch, rows: int) -> Iterator[Batch]:
    """The batch in parts of up to so many rows."""
    for start in range(0, len(batch.ids), rows):
        part = slice(start, start + rows)
        labels = batch.labels[part]
        yield replace(
            batch, ids=batch.ids[part], labels=labels, positions=batch.positions[part], document=batch.document[part],
            trained_tokens=int((labels != IGNORE_INDEX).sum()),
        )  # fmt: skip
