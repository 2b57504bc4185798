"""The distance of two adapters, against the matrices themselves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from tests.adapters.test_combination import MODULES, adapter, adapters, changes

from octavo.adapters.difference import distances, full_difference, total
from octavo.errors import AdapterError
from octavo.store.peft import Adapter


def vector(one: Adapter) -> torch.Tensor:
    """All changes of an adapter as one vector, 0 for modules without LoRA."""
    found = changes(one)
    return torch.cat([found.get(name, torch.zeros(7, 5, dtype=torch.float64)).flatten() for name in MODULES])


@settings(max_examples=30, deadline=None)
@given(adapters(), adapters())
def test_the_distance_is_that_of_the_matrices(a: Adapter, b: Adapter) -> None:
    x, y, whole = vector(a), vector(b), total(distances(a, b))
    assert whole.norm_a == pytest.approx(float(x.norm()))
    assert whole.norm_b == pytest.approx(float(y.norm()))
    assert whole.cosine == pytest.approx(float(x @ y / (x.norm() * y.norm())), abs=1e-9)
    assert whole.difference == pytest.approx(float((x - y).norm()), abs=1e-9)
    assert whole.relative_to_a == pytest.approx(float((x - y).norm() / x.norm()), abs=1e-9)
    assert whole.relative_to_b == pytest.approx(float((x - y).norm() / y.norm()), abs=1e-9)


@settings(max_examples=20, deadline=None)
@given(adapters())
def test_an_adapter_and_itself(a: Adapter) -> None:
    for one in distances(a, a):
        assert one.distance.cosine == pytest.approx(1, abs=1e-12)
        assert one.distance.difference == 0.0
    assert total(distances(a, a)).cosine == pytest.approx(1, abs=1e-12)


def test_a_module_of_one_adapter_alone_is_0_in_the_other() -> None:
    a, b = adapter(2, MODULES[:2]), adapter(3, MODULES[1:], seed=1)
    first, _, last, _ = distances(a, b)
    assert [one.name for one in distances(a, b)] == MODULES
    assert first.distance.norm_b == last.distance.norm_a == 0
    assert first.distance.cosine is None
    assert first.distance.difference == first.distance.norm_a > 0
    assert first.distance.relative_to_b is None
    assert (first.layer, last.layer) == (0, 1)


def test_an_adapter_that_changes_nothing_has_no_cosine() -> None:
    a, b = adapter(2, MODULES), adapter(2, MODULES)
    for name, (matrix, zero, scaling) in b.lora.items():
        b.lora[name] = (matrix, torch.zeros_like(zero), scaling)
    whole = total(distances(a, b))
    assert (whole.cosine, whole.relative_to_b) == (None, None)
    assert whole.relative_to_a == pytest.approx(1)


def test_other_shapes_are_another_model() -> None:
    a, b = adapter(2, MODULES), adapter(2, MODULES)
    b.lora[MODULES[0]] = torch.zeros(2, 6), torch.zeros(7, 2), 1.0
    with pytest.raises(AdapterError, match="is 7 x 5 in one and 7 x 6 in the other"):
        distances(a, b)


def test_tensors_trained_in_full() -> None:
    a = adapter(1, MODULES, full={"norm.weight": torch.tensor([3.0, 4.0]), "x.bias": torch.ones(1)})
    b = adapter(1, MODULES, full={"norm.weight": torch.tensor([3.0, 3.0]), "x.bias": torch.ones(2)})
    assert full_difference(a, b) == (["x.bias"], ["x.bias"], 1.0, 5.0)
