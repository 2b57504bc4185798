"""When graphs are captured and dropped, with fakes in place of CUDA graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from octavo.infer.graphs import Graphs
from octavo.layers.multi_lora import ServedAdapters


class Pooled:
    """A graph with its memory pool."""

    def __init__(self, pool: Any) -> None:
        self._pool = pool or object()

    def pool(self) -> Any:
        return self._pool


class FakeGraph:
    """A captured graph, its shape and its pool."""

    def __init__(self, size: int, pool: Any) -> None:
        self.size, self.graph = size, Pooled(pool)
        assert not torch.is_grad_enabled()


@pytest.fixture
def synchronized(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The devices that were synchronized."""
    devices: list[Any] = []
    monkeypatch.setattr(torch.cuda, "synchronize", devices.append)
    return devices


def test_each_shape_is_captured_once_and_all_share_a_pool(synchronized: list[Any]) -> None:
    graphs: Graphs[Any] = Graphs(ServedAdapters(), torch.device("cpu"))
    first, second = graphs.get(4, FakeGraph), graphs.get(16, FakeGraph)
    assert (first.size, second.size) == (4, 16)
    assert graphs.get(4, FakeGraph) is first
    assert graphs.get(16, FakeGraph) is second
    assert first.graph.pool() is second.graph.pool()
    assert synchronized == []


def test_replaced_adapter_tensors_drop_all_graphs_after_a_synchronization(synchronized: list[Any]) -> None:
    adapters, device = ServedAdapters(), torch.device("cpu")
    graphs: Graphs[Any] = Graphs(adapters, device)
    before = graphs.get(4, FakeGraph)
    adapters.changes += 1
    after = graphs.get(4, FakeGraph)
    assert after is not before
    assert after.graph.pool() is not before.graph.pool()
    assert graphs.get(4, FakeGraph) is after
    assert synchronized == [device]
