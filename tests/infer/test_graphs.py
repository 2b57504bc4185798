"""When graphs are recorded and dropped, with stand-ins for what a card records."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from octavo.infer.graphs import Graphs
from octavo.layers.multi_lora import ServedAdapters


class Pooled:
    """A graph that knows the pool it lies in."""

    def __init__(self, pool: Any) -> None:
        self._pool = pool or object()

    def pool(self) -> Any:
        return self._pool


class Made:
    """What was recorded: of which size, in which pool."""

    def __init__(self, size: int, pool: Any) -> None:
        self.size, self.graph = size, Pooled(pool)
        assert not torch.is_grad_enabled()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The devices that were waited for."""
    waited: list[Any] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    return waited


def test_each_size_is_recorded_once_and_all_share_a_pool(waits: list[Any]) -> None:
    graphs: Graphs[Any] = Graphs(ServedAdapters(), torch.device("cpu"))
    first, second = graphs.of(4, Made), graphs.of(16, Made)
    assert (first.size, second.size) == (4, 16)
    assert graphs.of(4, Made) is first
    assert graphs.of(16, Made) is second
    assert first.graph.pool() is second.graph.pool()
    assert waits == []


def test_other_tensors_make_them_be_recorded_anew_after_the_card_is_done(waits: list[Any]) -> None:
    routing, device = ServedAdapters(), torch.device("cpu")
    graphs: Graphs[Any] = Graphs(routing, device)
    before = graphs.of(4, Made)
    routing.changes += 1
    after = graphs.of(4, Made)
    assert after is not before
    assert after.graph.pool() is not before.graph.pool()
    assert graphs.of(4, Made) is after
    assert waits == [device]
