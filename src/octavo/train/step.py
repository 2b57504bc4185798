"""Forward and backward of one micro-batch: eager, or as a replayed CUDA graph.

A micro-batch of GPT-J with 2,048 tokens launches about 3,600 kernels. A GPU runs them in 115 ms, and a CPU needs 320 ms
to launch them (one H100, docs/log.md). A graph is captured once for each kind of micro-batch and replayed with one
launch.

Legend: B rows of a micro-batch, T positions; the loss scale is the scaler's scale over the trained tokens of the step.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from octavo.data.loader import Batch
from octavo.data.packing import IGNORE_INDEX
from octavo.layers.context import ForwardOptions
from octavo.layers.dropout import CountingDropout, Dropout, GraphDropout
from octavo.layers.frozen import FrozenLinear
from octavo.models import Decoder
from octavo.objective import Inputs, Objective, inputs_of, next_token_loss
from octavo.ops.attention import Documents, find_documents
from octavo.runtime.capture import allocate_workspaces, capturing
from octavo.runtime.offload import join
from octavo.train.memory import MemoryPlan, document_slots, most_documents
from octavo.train.precision import Precision, matmul8_of

Kind = tuple[int, bool]  # of a graph: document slots, 0 for rows of one document each; whether labels have weights


class MicroStep(Protocol):
    """Adds the gradients of loss_scale * (the objective of a batch) to the parameters'; returns the objective.

    `generator`, on the CPU, draws the seeds of the dropout masks; None: PyTorch's default one.
    """

    def __call__(self, batch: Batch, loss_scale: float, generator: torch.Generator | None = None) -> Tensor: ...

    @property
    def rows(self) -> int:
        """The most rows of a micro-batch."""
        ...

    def release(self) -> None:
        """Frees the memory that is held between calls."""
        ...

    def reduce_memory(self) -> bool:
        """Uses less memory from now on; False if that is not possible."""
        ...


@dataclass
class EagerStep:
    """Kernel by kernel, on any device."""

    decoder: Decoder
    options: ForwardOptions = field(default_factory=ForwardOptions)
    objective: Objective = next_token_loss
    rows: int = sys.maxsize

    def __call__(self, batch: Batch, loss_scale: float, generator: torch.Generator | None = None) -> Tensor:
        options = self.options if generator is None else replace(self.options, dropout=Dropout(generator))
        loss = self.objective(self.decoder, inputs_of(batch, self.device), options)
        if loss.requires_grad and batch.trained_tokens:
            (loss * loss_scale).backward()
        return loss.detach()

    @property
    def device(self) -> torch.device:
        return self.decoder.embed.matrix.device

    def release(self) -> None:
        if self.options.offload:
            join(self.device)  # memory that a copy of a failed pass still writes to must not be allocated again

    def reduce_memory(self) -> bool:
        return False


class GraphStep:
    """CUDA graphs: one for micro-batches with one document per row, one for packed rows, in one memory pool.

    The first micro-batch of a kind runs eagerly, in which libraries choose their kernels; the next one is captured.
    Missing rows are filled with padding, so that all micro-batches have one shape. A replay draws new dropout masks
    (layers/dropout.py). `most_documents` are those of a packed micro-batch, if the number is known: no graph has more
    document slots. The pool starts with one free block of `reserved_bytes`.
    """

    def __init__(
        self, eager: EagerStep, seen: set[Kind], most_documents: int | None = None, *, reserved_bytes: int = 0
    ) -> None:
        self.eager, self.rows, self.most_documents = eager, eager.rows, most_documents
        self.reserved_bytes = reserved_bytes
        self._seen = seen  # kinds that have run eagerly
        self._graphs: dict[Kind, _Graph] = {}

    def __call__(self, batch: Batch, loss_scale: float, generator: torch.Generator | None = None) -> Tensor:
        documents = find_documents(batch.piece, torch.device("cpu"))
        slots = _document_slots(documents, self.most_documents, missing=self.rows - len(batch.ids))
        kind = slots, batch.weights is not None
        if kind not in self._seen:
            self._seen.add(kind)
            self.release()  # an eager pass uses as much memory as the graphs hold
            return self.eager(batch, loss_scale, generator)
        if kind not in self._graphs:
            shape = (self.rows, batch.ids.shape[1])
            pool = next(iter(self._graphs.values())).graph.pool() if self._graphs else None
            self._graphs[kind] = _Graph(self.eager, shape, kind, pool, 0 if self._graphs else self.reserved_bytes)
        return self._graphs[kind].replay(batch, documents, loss_scale, generator)

    def release(self) -> None:
        """Frees the graphs with the memory of their activations; they are captured again when they are needed."""
        self.eager.release()
        if self._graphs:
            torch.cuda.synchronize()  # a replay may still use the memory
        for graph in self._graphs.values():
            graph.graph.reset()
        self._graphs.clear()
        torch.cuda.empty_cache()

    def reduce_memory(self) -> bool:
        return False


class _Graph:
    """One captured micro-step with the tensors that it reads and writes."""

    def __init__(self, eager: EagerStep, shape: tuple[int, int], kind: Kind, pool: Any, reserved_bytes: int) -> None:
        (slots, weighted), device, labels = kind, eager.device, shape[0] * shape[1]
        self.ids, self.positions, self.number = (  # (B, T) each
            torch.zeros(shape, dtype=torch.int64, device=device) for _ in range(3)
        )
        self.labels = torch.full((labels,), IGNORE_INDEX, dtype=torch.int64, device=device)  # (B T,)
        self.weights = torch.ones(labels, device=device) if weighted else None  # (B T,)
        # Valid offsets from the start: attention writes nothing at positions outside of all documents.
        self.offsets = torch.arange(slots + 1, dtype=torch.int32, device=device).clamp_max(shape[0]) * shape[1]
        self.loss_scale = torch.zeros((), device=device)
        documents = Documents(self.number, self.offsets, shape[1]) if slots else None
        inputs = Inputs(self.ids, self.positions, self.labels, None, documents, self.weights)
        self.graph = torch.cuda.CUDAGraph()
        self.dropout = GraphDropout(self.graph, self._count_masks(eager, inputs), device)
        options = replace(eager.options, dropout=self.dropout)
        torch.cuda.empty_cache()  # cached blocks of eager passes would add to the memory of the graph
        with capturing(self.graph, pool, device, backward=True):
            if reserved_bytes:
                torch.empty(reserved_bytes, dtype=torch.uint8, device=device)  # freed at once, for the step's blocks
            try:
                loss = eager.objective(eager.decoder, inputs, options)
                loss.backward(gradient=self.loss_scale)
                self.loss = loss.detach()
            finally:
                join(device)  # a failed capture that ends before its copies would report that instead of its error

    def _count_masks(self, eager: EagerStep, inputs: Inputs) -> int:
        """The dropout masks of a pass with these inputs, by an eager one whose loss scale is 0."""
        layers = (layer for layer in eager.decoder.modules() if isinstance(layer, FrozenLinear))
        if not any(layer.lora and layer.dropout for layer in layers):
            return 0
        counting = CountingDropout()
        # What is derived from `documents` is stored in them: the captured pass must derive it again in each replay.
        documents = None if inputs.documents is None else replace(inputs.documents)
        eager.objective(
            eager.decoder, replace(inputs, documents=documents), replace(eager.options, dropout=counting)
        ).backward(gradient=self.loss_scale)
        return counting.count

    def replay(
        self, batch: Batch, documents: Documents | None, loss_scale: float, generator: torch.Generator | None
    ) -> Tensor:
        (rows, length), given = self.ids.shape, len(batch.ids)
        for target, source in ((self.ids, batch.ids), (self.positions, batch.positions)):
            target[:given].copy_(source.pin_memory(), non_blocking=True)
        self.labels[: given * length].copy_(batch.labels.flatten().pin_memory(), non_blocking=True)
        if self.weights is not None and batch.weights is not None:
            self.weights[: given * length].copy_(batch.weights.flatten().pin_memory(), non_blocking=True)
        if given < rows:
            self.ids[given:].zero_()
            self.positions[given:].zero_()
            self.labels[given * length :].fill_(IGNORE_INDEX)
        if documents is not None:
            self.number[:given].copy_(batch.piece.pin_memory(), non_blocking=True)
            # A missing row is one document; unused slots are documents of no length at the end.
            more = torch.arange(given + 1, rows + 1, dtype=torch.int32) * length
            offsets = torch.cat([documents.offsets, more])
            end = offsets.new_full((len(self.offsets) - len(offsets),), rows * length)
            self.offsets.copy_(torch.cat([offsets, end]).pin_memory(), non_blocking=True)
        self.loss_scale.fill_(loss_scale)
        self.dropout.reseed(generator)
        self.graph.replay()
        return self.loss.clone()


def _document_slots(documents: Documents | None, most: int | None = None, *, missing: int = 0) -> int:
    """The document slots of a micro-batch: each of its `missing` rows is one document too."""
    return 0 if documents is None else document_slots(len(documents.offsets) - 1 + missing, most)


class PlannedStep:
    """Micro-steps by a memory plan. After running out of memory a plan for less memory replaces it.

    `documents` are the most of a row, its padding counted as one; None if they are not known. `limited`: the process
    has a limit of GPU memory (`torch.cuda.set_per_process_memory_fraction`). A graph reserves the forecast of its
    blocks then, since PyTorch would need their last growth once more (docs/design/memory.md).
    """

    def __init__(
        self,
        decoder: Decoder,
        plan: MemoryPlan,
        *,
        graphs: bool,
        cheaper: Callable[[MemoryPlan], MemoryPlan | None],
        warn: Callable[[str], None],
        precision: Precision | None = None,
        objective: Objective = next_token_loss,
        fused: bool = True,
        documents: int | None = None,
        limited: bool = False,
    ) -> None:
        self.decoder, self.plan, self.graphs, self.documents = decoder, plan, graphs, documents
        self.limited = limited
        self.precision, self.objective, self.fused = precision or Precision(), objective, fused
        self._cheaper, self._warn = cheaper, warn
        self._step: EagerStep | GraphStep | None = None
        self._seen: set[Kind] = set()
        self._place_embedding()

    @property
    def rows(self) -> int:
        return self.plan.rows

    def _make(self) -> EagerStep | GraphStep:
        """The step of the plan, with its tensors."""
        allocate_workspaces(self.decoder.embed.matrix.device)
        matmul8 = matmul8_of(self.decoder, self.precision, transposed=self.plan.transposed)
        options = ForwardOptions(
            self.plan.save, self.plan.offload, matmul8, fused=self.fused, tiled_head=self.plan.tiled_head
        )
        eager = EagerStep(self.decoder, options, self.objective, self.plan.rows)
        if not self.graphs:
            return eager
        return GraphStep(
            eager, self._seen, most_documents(self.plan.rows, self.documents or 0) or None,
            reserved_bytes=self.plan.large_bytes if self.limited else 0,
        )  # fmt: skip

    def _place_embedding(self) -> None:
        if self.decoder.untied_embedding is not None:
            self.decoder.untied_embedding.set_host_resident_(self.plan.offload)

    def __call__(self, batch: Batch, loss_scale: float, generator: torch.Generator | None = None) -> Tensor:
        if self._step is None:  # made here, where running out of memory leads to another plan
            self._step = self._make()
        return self._step(batch, loss_scale, generator)

    def release(self) -> None:
        if self._step is not None:
            self._step.release()
            self._step = None  # with the transposed weights, after the graphs that read them

    def reduce_memory(self) -> bool:
        """After running out of memory: the next cheaper plan, or the last one without CUDA graphs. False for neither.

        A graph keeps the memory of its step to itself, so that recording it needs more than running the step.
        """
        gc.collect()  # contexts of autograd functions may be in reference cycles with tensors of the failed pass
        self.release()
        plan = self._cheaper(self.plan)
        if plan is None and self.graphs:
            self.graphs, self._seen = False, set()
            self._warn("The GPU ran out of memory. The run continues without CUDA graphs, which need more of it.")
            return True
        if plan is None:
            return False
        device = "The GPU" if self.decoder.embed.matrix.device.type == "cuda" else "The process"
        self._warn(
            f"{device} ran out of memory with a plan for {self.plan.peak_bytes / 2**30:.2f} GiB. The run continues "
            f"with one for {plan.peak_bytes / 2**30:.2f} GiB: {plan.describe()}."
        )
        self.plan, self._seen = plan, set()
        self._place_embedding()
        return True


def micro_batches(batch: Batch, rows: int) -> Iterator[Batch]:
    """The batch in micro-batches of up to `rows` rows."""
    if rows >= len(batch.ids):
        yield batch
        return
    for start in range(0, len(batch.ids), rows):
        part = slice(start, start + rows)
        labels = batch.labels[part]
        yield replace(
            batch, ids=batch.ids[part], labels=labels, positions=batch.positions[part], piece=batch.piece[part],
            weights=None if batch.weights is None else batch.weights[part], row_sources=batch.row_sources[part],
        )  # fmt: skip
