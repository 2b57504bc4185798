"""The names of tensors in PEFT's files.

All have the prefix base_model.model. and the name of a module in transformers; store/peft.py lists the ends.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from octavo.bounded_json import some
from octavo.errors import AdapterError

PREFIX = "base_model.model."
TOKENS = ".token_adapter.trainable_tokens_delta"
COUNTERPARTS = {"lora_A": "lora_B", "lora_B": "lora_A"}
COUNTERPARTS |= {"lora_embedding_A": "lora_embedding_B", "lora_embedding_B": "lora_embedding_A"}
ENDS = {".lora_A.weight": "lora_A", ".lora_B.weight": "lora_B", TOKENS: "tokens"}
ENDS |= {f".{kind}": kind for kind in ("lora_embedding_A", "lora_embedding_B")}
# PEFT's wrappers around a module. Their content is the module's own parameter or a trained copy of it.
WRAPPERS = re.compile(r"\.(?:base_layer|modules_to_save(?:\.default)?|token_adapter\.base_layer)\.")


class Name(NamedTuple):
    """The name of a tensor, read: its module, and weight, bias, tokens or one of COUNTERPARTS.

    `other` is the name of the second matrix of a LoRA.
    """

    module: str
    kind: str
    other: str = ""


def parsed(folder: Path, tensors: Mapping[str, Tensor]) -> dict[str, Name]:
    """The tensor names of a file, read. AdapterError that names those that octavo does not read or that are missing,
    and two tensors of one parameter that differ.

    PEFT writes an embedding of a resized vocabulary twice, with and without its wrapper. The untrained weights of
    modules_to_save, which PEFT saves too, are left out.
    """
    trained = [key for key in tensors if ".original_module." not in key]
    names = {key: name for key in trained if (name := _parse(key)) is not None}
    if bare := [key for key in trained if not key.startswith(PREFIX) and _parse(PREFIX + key) is not None]:
        raise AdapterError(
            f"The adapter in {folder} holds {some(sorted(bare))} without the prefix of PEFT's names.",
            hint=f"PEFT ignores such tensors: its output is that of the base. Add {PREFIX} to their names.",
        )
    if unread := [key for key in trained if key not in names]:
        raise AdapterError(
            f"The adapter in {folder} holds {some(sorted(unread))}, which octavo does not read.",
            hint="It reads the LoRA matrices, weights, biases and trained tokens that PEFT writes for LoRA. Was a "
            "tensor renamed? Restore the file from a copy, or remove these tensors from it.",
        )
    if several := _of_one_parameter(names, tensors):
        raise AdapterError(
            f"The adapter in {folder} holds {names[several[0]].module} twice: {some(several)}.",
            hint="Only one of them can be used. Restore the file from a copy, or remove the other tensors from it.",
        )
    if missing := [name.other for name in names.values() if name.other and name.other not in names]:
        raise AdapterError(
            f"The adapter in {folder} lacks {some(sorted(missing))}: it has only one of the two matrices of "
            "these modules.",
            hint="Was the file cut, or a tensor renamed? Restore it from a copy.",
        )
    return names


def _of_one_parameter(names: Mapping[str, Name], tensors: Mapping[str, Tensor]) -> list[str]:
    """Two tensors of one parameter that differ; [] if there are none. A of an embedding is an A."""
    first: dict[tuple[str, str], str] = {}
    for key, name in names.items():
        other = first.setdefault((name.module, name.kind.replace("lora_embedding_", "lora_")), key)
        if other != key and not (name.kind == names[other].kind and torch.equal(tensors[other], tensors[key])):
            return [other, key]
    return []


def _parse(key: str) -> Name | None:
    if not key.startswith(PREFIX):
        return None
    name = key.removeprefix(PREFIX)
    for end, kind in ENDS.items():
        if name.endswith(end):
            module = name.removesuffix(end)
            other = PREFIX + module + end.replace(kind, COUNTERPARTS[kind]) if kind in COUNTERPARTS else ""
            return Name(module, kind, other) if module else None
    name = WRAPPERS.sub(".", name)
    module, _, kind = name.rpartition(".")
    if not module or kind not in ("weight", "bias") or ".lora_" in name:
        return None
    return Name(module, kind)
