"""Weights of a source into a model, or into a folder: one tensor at a time, quantised as it passes.

A folder that octavo writes under a scheme is a Hugging Face folder whose config.json has one more entry,
"octavo": {"scheme": ..}, and whose frozen tensors stand under the names of hivemind/gpt-j-6B-8bit:
NAME.weight holds the codes, NAME.absmax the scales, NAME.code the code table of dynamic8. Under the scheme
`none` it is a plain Hugging Face folder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from octavo.errors import ModelError
from octavo.models import Model, Place, build, places
from octavo.ops.quantize import Parts, Scheme, dequantise, scheme_named
from octavo.store.sources import Source

SCALE_KINDS = ("absmax", "code")
PLAIN_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # of weights under no scheme
# Buffers that older checkpoints carry and that are computed here.
IGNORED = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq", ".attn.rotary_emb.inv_freq")


@dataclass(frozen=True)
class Item:
    """One entry of a checkpoint that belongs to a place: a frozen weight, or a norm's or bias's numbers."""

    place: Place
    kind: str  # "weight" or "bias"

    @property
    def is_matrix(self) -> bool:
        return self.place.matrix is not None and self.kind == "weight"


def stored_scheme(source: Source) -> Scheme:
    """The scheme that the source's frozen weights are stored under."""
    own = source.config.get("octavo")
    if isinstance(own, dict):
        return scheme_named(str(own.get("scheme")))
    coded = any(name.endswith(".code") for name in source.names())
    return scheme_named("dynamic8" if coded else "none")


def load(
    source: Source,
    scheme: Scheme,
    *,
    dtype: torch.dtype,
    device: torch.device,
    progress: Callable[[int, int], None] | None = None,
) -> Model:
    """The model of `source`, frozen under `scheme`, computing in `dtype` on `device`, in eval mode.

    What is stored under the same scheme is taken bit for bit; anything else is quantised as it passes.
    Memory: the quantised model, and 1.25 times the largest tensor in float32. ModelError names what is
    missing, unknown, misshapen or not finite.
    """
    model = build(source.config)
    _make_room_(model, device)
    for matrix in {id(p.matrix): p.matrix for p in places(model).values()}.values():
        if matrix is not None:
            matrix.allocate(scheme, dtype, device)
    stored = stored_scheme(source)
    items = entries(source, model)
    for done, (name, item) in enumerate(items.items()):
        if item.is_matrix:
            _put_matrix(source, name, item.place, stored=stored, scheme=scheme, dtype=dtype, device=device)
        else:
            _put_parameter(name, item, source.tensor(name))
        if progress:
            progress(done + 1, len(items))
    return model


def _make_room_(model: Model, device: torch.device) -> None:
    """Empty norms and biases on `device`. nn.Module.to_empty would do, but imports 500 modules to find out how."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            empty = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            setattr(module, name, nn.Parameter(empty, requires_grad=False))


def entries(source: Source, model: Model) -> dict[str, Item]:
    """Tensor name -> what it is, in the model's order. Everything needed is there, nothing is left over."""
    wanted = dict(items_of(model))
    present = set(source.names())
    needless = {"lm_head.weight"} if model.config.tied else set()
    missing = [name for name in wanted if name not in present]
    unknown = [
        name
        for name in present - wanted.keys() - needless
        if not name.endswith(IGNORED) and name.rpartition(".")[2] not in SCALE_KINDS
    ]
    if missing or unknown:
        parts = [f"lacks {_some(missing)}"] * bool(missing) + [f"has {_some(sorted(unknown))} too many"] * bool(unknown)
        raise ModelError(
            f"The checkpoint {source.files[0].parent} does not fit its config.json: it {' and '.join(parts)}.",
            hint="Is the download complete, and is config.json the one that belongs to it?",
        )
    return wanted


def matrix_parts(source: Source, name: str, place: Place, stored: Scheme) -> Parts:
    """The stored parts of one frozen weight; shapes and types are as they must be, all numbers finite."""
    assert place.matrix is not None
    shape = (place.matrix.outputs[place.rows_key], place.matrix.in_features)
    module = name.removesuffix(".weight")
    parts = {}
    for part, (size, dtype) in stored.layout(shape, torch.float32).items():
        key = name if part == "weight" else f"{module}.{part}"
        if key != name and key not in source.names():
            raise ModelError(f"The checkpoint {source.files[0].parent} lacks {key}.")
        tensor = source.tensor(key)
        if part == "weight" and stored.name == "nf4":
            tensor = tensor.reshape(-1)
        if tuple(tensor.shape) != tuple(size):
            raise _misshapen(key, tensor, size)
        if tensor.dtype != dtype and not (stored.name == "none" and tensor.dtype in PLAIN_TYPES):
            raise ModelError(
                f"{key} is {tensor.dtype}, but the scheme {stored.name} stores {dtype}.",
                hint="Is config.json the one that belongs to the weights?",
            )
        if tensor.is_floating_point():
            _check_finite(key, tensor)
        parts[part] = tensor
    return parts


def full_weight(source: Source, name: str, place: Place, stored: Scheme) -> Tensor:
    """One frozen weight as floating-point numbers: as stored, or dequantised to float32."""
    parts = matrix_parts(source, name, place, stored)
    if stored.name == "none":
        return parts["weight"]
    assert place.matrix is not None
    return dequantise(stored, parts, (place.matrix.outputs[place.rows_key], place.matrix.in_features))


def _put_matrix(
    source: Source,
    name: str,
    place: Place,
    *,
    stored: Scheme,
    scheme: Scheme,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    assert place.matrix is not None
    if stored is scheme and scheme.name != "none":
        parts = matrix_parts(source, name, place, stored)
        # Names of one matrix share the code table that stands in it from the first of them on.
        shared = "code" in parts and place.rows_key != next(iter(place.matrix.outputs))
        if shared and not torch.equal(place.matrix.parts["code"], parts["code"].to(device)):
            raise ModelError(f"{name} has another code table than the layers beside it.")
    else:
        weight = full_weight(source, name, place, stored).to(device)
        if scheme.name == "none" and dtype != weight.dtype:
            weight = weight.to(dtype)
            _check_finite(f"{name} as {dtype}", weight, hint="Choose another compute type.")
        parts = scheme.quantise(weight)
    place.matrix.put(place.rows_key, parts)


def _put_parameter(name: str, item: Item, tensor: Tensor) -> None:
    target = item.place.parameter(item.kind)
    assert target is not None
    if tensor.shape != target.shape:
        raise _misshapen(name, tensor, tuple(target.shape))
    _check_finite(name, tensor)
    target.copy_(tensor)


def _check_finite(name: str, tensor: Tensor, *, hint: str = "The checkpoint is damaged.") -> None:
    # A NaN or an infinity shows in the smallest or the largest number; unlike isfinite() this copies nothing.
    if not bool(torch.stack(tensor.aminmax()).isfinite().all()):
        raise ModelError(f"{name} holds numbers that are not finite.", hint=hint)


def _has(place: Place, kind: str) -> bool:
    return (kind == "weight" and place.matrix is not None) or place.parameter(kind) is not None


def _misshapen(name: str, tensor: Tensor, wanted: tuple[int, ...]) -> ModelError:
    return ModelError(
        f"{name} has the shape {tuple(tensor.shape)}, but the model's config.json makes it {tuple(wanted)}."
    )


def _some(names: list[str], most: int = 3) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most:,} more"


def items_of(model: Model) -> Iterator[tuple[str, Item]]:
    """(tensor name, item) of all that a checkpoint holds, in order; a tied head has no weight of its own."""
    tied = model.config.tied
    for place in places(model).values():
        for kind in ("weight", "bias"):
            if _has(place, kind) and not (tied and place.is_head and kind == "weight"):
                yield f"{place.name}.{kind}", Item(place, kind)
