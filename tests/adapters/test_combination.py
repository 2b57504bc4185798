"""Sums of adapters without files: weights, targets, ranks, and what cannot be added."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from octavo.adapters.combination import Weighted, combined, modules_of
from octavo.errors import AdapterError
from octavo.layers.lora import LoraSpec
from octavo.store.peft import Adapter

MODULES = [f"model.layers.{layer}.{name}" for layer in range(2) for name in ("q_proj", "up_proj")]
WEIGHTS = st.floats(-3, 3).filter(lambda weight: abs(weight) > 1e-3)


def adapter(rank: int, modules: list[str], *, seed: int = 0, alpha: float = 1.0, **values: Any) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    spec = LoraSpec(rank, alpha)
    lora = {
        name: (torch.randn(rank, 5, generator=generator), torch.randn(7, rank, generator=generator), spec.scaling)
        for name in modules
    }
    return Adapter(spec, lora, **{"full": {}, **values})


def changes(adapter: Adapter) -> dict[str, Tensor]:
    return {name: scaling * b.double() @ a.double() for name, (a, b, scaling) in adapter.lora.items()}


@st.composite
def adapters(draw: st.DrawFn) -> Adapter:
    modules = draw(st.lists(st.sampled_from(MODULES), min_size=1, unique=True))
    return adapter(draw(st.integers(1, 4)), modules, seed=draw(st.integers(0, 99)), alpha=draw(st.floats(0.1, 8)))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(WEIGHTS, adapters()), min_size=1, max_size=3), st.sampled_from([None, 1, 2, 50]))
def test_the_sum_is_that_of_the_matrices(parts: list[tuple[float, Adapter]], rank: int | None) -> None:
    result = combined([Weighted(*part) for part in parts], rank=rank)
    exact: dict[str, Tensor] = {}
    for weight, one in parts:
        for name, change in changes(one).items():
            exact[name] = exact.get(name, torch.zeros(7, 5, dtype=torch.float64)) + weight * change
    got = changes(result.adapter)
    assert got.keys() == exact.keys()
    for name, change in exact.items():
        ranks = sum(one.lora[name][0].shape[0] for _, one in parts if name in one.lora)
        assert len(result.adapter.lora[name][0]) <= (ranks if rank is None else min(ranks, rank))
        scale = sum(abs(weight) * float(changes(one)[name].norm()) for weight, one in parts if name in one.lora)
        tail = torch.linalg.svdvals(change)[rank or 50 :].norm()
        assert float((got[name] - change).norm()) == pytest.approx(float(tail), abs=1e-5 * scale)


@settings(max_examples=20, deadline=None)
@given(adapters(), adapters())
def test_weights_1_and_0_give_the_first(a: Adapter, b: Adapter) -> None:
    result = combined([Weighted(1.0, a), Weighted(0.0, b)]).adapter
    assert result.lora.keys() == a.lora.keys()
    for name, (matrix_a, matrix_b, scaling) in a.lora.items():
        got = result.lora[name]
        assert torch.equal(got[0], matrix_a)
        assert torch.equal(got[1], matrix_b)
        assert got[2] == scaling


def test_the_rank_and_alpha_of_most_modules_are_those_of_the_adapter() -> None:
    a, b = adapter(2, MODULES, alpha=4), adapter(3, MODULES[:1], seed=1, alpha=6)
    spec = combined([Weighted(1.0, a), Weighted(1.0, b)]).adapter.spec
    assert (spec.rank, spec.alpha, spec.rslora) == (2, 4, False)


def test_shapes_that_differ_are_an_error() -> None:
    a, b = adapter(2, MODULES), adapter(2, MODULES)
    wide = torch.zeros(2, 6), torch.zeros(7, 2), 1.0
    b.lora[MODULES[1]] = wide
    with pytest.raises(AdapterError, match=r"layers\.0\.up_proj has 5 inputs and 7 outputs and 6 inputs"):
        combined([Weighted(1.0, a), Weighted(1.0, b)])


def test_one_embedding_and_one_linear_of_a_name_are_an_error() -> None:
    a, b = adapter(2, ["wte"], embeddings=frozenset(["wte"])), adapter(2, ["wte"])
    with pytest.raises(AdapterError, match="do not fit each other"):
        combined([Weighted(1.0, a), Weighted(1.0, b)])


def test_full_weights_of_different_shapes_are_an_error() -> None:
    a, b = (adapter(1, MODULES, full={"lm_head.weight": torch.zeros(size, 5)}) for size in (7, 8))
    with pytest.raises(AdapterError, match=r"lm_head\.weight is \(7, 5\) and \(8, 5\)"):
        combined([Weighted(0.5, a), Weighted(0.5, b)])
    with pytest.raises(AdapterError, match=r"\(7, 5\) in the adapters and \(9, 5\) in the base"):
        combined([Weighted(0.5, a)], base=lambda key: torch.zeros(9, 5))


def test_a_sum_that_overflows_is_an_error() -> None:
    a, b = adapter(1, MODULES, alpha=1e6), adapter(1, MODULES, alpha=1e-3)
    huge = {name: (torch.full_like(x, 3e38), torch.full_like(y, 3e38), 1e6) for name, (x, y, _) in a.lora.items()}
    with pytest.raises(AdapterError, match="not finite in float32"):
        combined([Weighted(1.0, Adapter(a.spec, huge, {})), Weighted(1.0, b)], rank=1)


def test_without_a_model_last_names_are_written_alone_only_if_a_config_selects_them_so() -> None:
    one = adapter(1, MODULES)  # not of a file: no config says that it has all modules of a name
    assert modules_of([Weighted(1.0, one)], one) == {*MODULES, "q_proj", "up_proj"}
