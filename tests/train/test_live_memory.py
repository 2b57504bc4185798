"""The live bytes of a simulated step are those of a real one, for every family.

A step with real tensors runs on the CPU as a GPU runs it: an operation that has a kernel allocates its result alone,
and attention allocates what `simulated_attention` says. All else, and soft-capped attention, is the code of a run.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.models.families import CASES
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from octavo import adapters
from octavo.adapters import AdapterPlan
from octavo.layers.context import ForwardOptions, Save
from octavo.layers.lora import LoraSpec, flatten_
from octavo.objective import Inputs, next_token_loss
from octavo.ops import attention
from octavo.ops.attention import AddedMasks, AttentionSpec, Documents
from octavo.ops.quantize import scheme_named
from octavo.ops.simulated_attention import flash_attention
from octavo.runtime.dispatch import KERNELS
from octavo.store.weights import allocated

ROWS, LENGTH = 2, 40
# The first case of each family. The others are in the exhaustive tests.
FIRST = set({config.model_type: case for case, config in reversed(CASES.items())}.values())


class LiveBytes(TorchDispatchMode):
    """The bytes of the tensors that are made, and not freed, while the mode is active; and their peak."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self.paused = False
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.paused:
            return function(*args, **(kwargs or {}))
        for tensor in (*args, *(kwargs or {}).values()):
            if isinstance(tensor, Tensor):
                self._known.add(tensor.untyped_storage())
        result = function(*args, **(kwargs or {}))
        self.count(result)
        return result

    def count(self, result: Any) -> None:
        """Adds the new tensors among the results of an operation."""
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor) and tensor.untyped_storage() not in self._known:
                storage = tensor.untyped_storage()
                self._known.add(storage)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._free, storage.nbytes())

    def _free(self, size: int) -> None:
        self.live -= size


@pytest.fixture
def as_on_gpu(monkeypatch: pytest.MonkeyPatch) -> LiveBytes:
    """Counts live bytes; operations of CPU tensors allocate as those of a GPU do."""
    bytes_ = LiveBytes()

    def module(name: str) -> SimpleNamespace:
        file = name.rpartition(".")[2]
        return SimpleNamespace(**{
            key.partition(".")[2]: _quiet(KERNELS[key], bytes_) for key in KERNELS if key.partition(".")[0] == file
        })  # fmt: skip

    def attention_of_gpu(
        q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, *, documents: Documents | None = None, masks: AddedMasks
    ) -> Tensor:
        if q.is_meta or spec.softcap is not None:
            return attention.causal_attention(q, k, v, spec, documents=documents)
        bounded = spec.bounded(q.shape[1])
        sequences = len(documents.offsets) - 1 if documents else len(q) if bounded.window is not None else 0
        return flash_attention(q, k, v, sequences)

    monkeypatch.setattr("octavo.runtime.dispatch.kernels_run_on", lambda _: True)
    monkeypatch.setattr("octavo.fused.loss.kernels_run_on", lambda _: True)
    monkeypatch.setattr("octavo.runtime.dispatch.import_module", module)
    monkeypatch.setattr("octavo.layers.block.causal_attention", attention_of_gpu)
    monkeypatch.setattr(attention, "supports_varlen", lambda flash, *_, **__: flash)  # also in float32
    # These kernels allocate other tensors than their references: tests/kernels/test_lora_tiles.py.
    monkeypatch.setattr("octavo.fused.lora_operands._in_front", lambda *_: None)
    return bytes_


def _quiet(reference: Callable[..., Any], bytes_: LiveBytes) -> Callable[..., Any]:
    """The reference of a kernel, of which only the result is counted."""

    def call(*args: Any, **kwargs: Any) -> Any:
        bytes_.paused = True
        try:
            result = reference(*args, **kwargs)
        finally:
            bytes_.paused = False
        bytes_.count(result)
        return result

    return call


def peak(config: dict[str, Any], device: str, options: ForwardOptions, packed: bool, bytes_: LiveBytes) -> int:
    """The peak of the live bytes of a step."""
    model = allocated(config, scheme_named("int8"), dtype=torch.float32, device=torch.device(device))
    adapters.create_(model, AdapterPlan(LoraSpec()), seed=0)
    flatten_(adapters.trained(model))
    model.train()
    ids, number = (torch.zeros(ROWS, LENGTH, dtype=torch.int64, device=device) for _ in range(2))
    positions = torch.arange(LENGTH, device=device).expand(ROWS, LENGTH).contiguous()
    offsets = torch.arange(5, dtype=torch.int32, device=device) * (ROWS * LENGTH // 4)
    documents = Documents(number, offsets, LENGTH) if packed else None
    inputs = Inputs(ids, positions, ids.flatten(), None, documents)
    bytes_.live = bytes_.peak = 0
    with bytes_:
        next_token_loss(model, inputs, options).backward()
    return bytes_.peak


@pytest.mark.parametrize(
    ("fused", "packed"),
    [
        (True, False),
        pytest.param(True, True, marks=pytest.mark.exhaustive),
        pytest.param(False, False, marks=pytest.mark.exhaustive),
    ],
    ids=["fused", "fused, packed", "plain"],
)
@pytest.mark.parametrize("case", [pytest.param(c, marks=() if c in FIRST else pytest.mark.exhaustive) for c in CASES])
def test_the_simulated_peak_is_that_of_a_step(case: str, fused: bool, packed: bool, as_on_gpu: LiveBytes) -> None:
    config = CASES[case].to_dict()
    for save in Save:
        options = ForwardOptions(save, fused=fused)
        real, simulated = (peak(config, device, options, packed, as_on_gpu) for device in ("cpu", "meta"))
        assert simulated == real > 0, save
