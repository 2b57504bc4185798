"""How two adapters of one base differ, module by module, from their low-rank factors (low_rank.py)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from octavo.adapters import low_rank
from octavo.adapters.combination import by_layer
from octavo.bounded_json import some
from octavo.errors import AdapterError
from octavo.models import layer_of
from octavo.store.peft import Adapter


@dataclass(frozen=True)
class Distance:
    """Two changes X and Y of weights: their norms, trace(X^T Y), and ||X - Y||_F. Sums over modules are of squares."""

    norm_a: float
    norm_b: float
    inner: float
    difference: float

    @property
    def cosine(self) -> float | None:
        """<X, Y> / (||X|| ||Y||); None if one of them is 0."""
        scale = self.norm_a * self.norm_b
        return max(-1.0, min(1.0, self.inner / scale)) if scale else None

    @property
    def relative_to_a(self) -> float | None:
        return self.difference / self.norm_a if self.norm_a else None

    @property
    def relative_to_b(self) -> float | None:
        return self.difference / self.norm_b if self.norm_b else None


@dataclass(frozen=True)
class ModuleDistance:
    """The changes of one module. An adapter without it changes it by 0."""

    name: str
    distance: Distance

    @property
    def layer(self) -> int | None:
        return layer_of(self.name)


def distances(a: Adapter, b: Adapter) -> list[ModuleDistance]:
    """The LoRA of both adapters, layer by layer. AdapterError for modules of other shapes."""
    found = []
    for name in by_layer({*a.lora, *b.lora}):
        x, y = a.lora.get(name), b.lora.get(name)
        if x is None or y is None:
            norms = low_rank.norm(x) if x else 0.0, low_rank.norm(y) if y else 0.0
            found.append(ModuleDistance(name, Distance(*norms, 0.0, max(norms))))
            continue
        if x[0].shape[1] != y[0].shape[1] or x[1].shape[0] != y[1].shape[0]:
            shapes = [f"{len(one[1]):,} x {one[0].shape[1]:,}" for one in (x, y)]
            raise AdapterError(
                f"The adapters are of different models: {some([name])} is {shapes[0]} in one and {shapes[1]} in the "
                "other.",
                hint="Name two adapters of one base.",
            )
        whole = Distance(low_rank.norm(x), low_rank.norm(y), low_rank.inner(x, y), low_rank.difference_norm(x, y))
        found.append(ModuleDistance(name, whole))
    return found


def total(found: Iterable[ModuleDistance]) -> Distance:
    """The distance of all of these modules together, as of one vector."""
    each = [one.distance for one in found]
    return Distance(
        math.hypot(*(one.norm_a for one in each)),
        math.hypot(*(one.norm_b for one in each)),
        math.fsum(one.inner for one in each),
        math.hypot(*(one.difference for one in each)),
    )


def full_difference(a: Adapter, b: Adapter) -> tuple[list[str], list[str], float, float]:
    """Of the tensors trained in full: (those in `a` alone, in `b` alone, ||a - b||, ||a||) over those in both.

    A tensor of another shape is in each alone.
    """
    both = [key for key, tensor in a.full.items() if key in b.full and b.full[key].shape == tensor.shape]
    differences = [float((a.full[key].double() - b.full[key].double()).norm()) for key in both]
    norms = [float(a.full[key].double().norm()) for key in both]
    only_a, only_b = (by_layer(key for key in one.full if key not in both) for one in (a, b))
    return only_a, only_b, math.hypot(*differences), math.hypot(*norms)
