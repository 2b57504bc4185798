"""The losses of the units of the held-out text as tensors of a checkpoint: a resumed run has paired intervals too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from octavo.intervals import Units, difference
from octavo.runs.events import HeldOut


def base_losses(units: Units, files: Mapping[str, Units]) -> dict[str, Tensor]:
    """The losses before training: of all units, and those of each file, in the order of `files`."""
    tensors = {"nats": torch.from_numpy(units.nats), "tokens": torch.from_numpy(units.tokens)}
    if files:
        tensors["file_nats"] = torch.from_numpy(np.concatenate([each.nats for each in files.values()]))
    return tensors


def units_before(
    saved: Mapping[str, Tensor], units: Units, files: Mapping[str, Units]
) -> tuple[Units, dict[str, Units]]:
    """The units of `base_losses` again; `units` and `files` are those of the same text now. No files if they differ."""
    before = replace(units, nats=saved["nats"].numpy(), tokens=saved["tokens"].numpy())
    counts = [len(each.nats) for each in files.values()]
    if "file_nats" not in saved or sum(counts) != len(saved["file_nats"]):
        return before, {}
    parts = np.split(saved["file_nats"].numpy(), np.cumsum(counts)[:-1])
    pairs = zip(files.items(), parts, strict=True)
    return before, {name: replace(each, nats=part) for (name, each), part in pairs}


def start_of_curve(units: Units) -> dict[str, Tensor]:
    """The evaluation before training, as newest and lowest one."""
    nats = torch.from_numpy(units.nats)
    zero = torch.zeros(1, dtype=torch.float64)
    return {"newest": nats, "lowest": nats.clone(), "passes": zero, "lowest_step": zero.clone()}


def next_of_curve(event: HeldOut, curve: Mapping[str, Tensor], units: Units) -> tuple[HeldOut, dict[str, Tensor]]:
    """(the event with its intervals, the curve with this evaluation). Unchanged if the units are not the same."""
    if any(len(curve[name]) != len(units.nats) for name in ("newest", "lowest")):
        return event, dict(curve)
    newest, lowest = (replace(units, nats=curve[name].numpy()) for name in ("newest", "lowest"))
    event = replace(
        event,
        passes_before=float(curve["passes"][0]),
        fall=difference(newest, units),
        rise=difference(units, lowest),
        lowest_step=int(curve["lowest_step"][0]),
    )
    nats = torch.from_numpy(units.nats)
    is_lowest = bool(units.nats.sum() < lowest.nats.sum())
    return event, {
        "newest": nats,
        "lowest": nats.clone() if is_lowest else curve["lowest"],
        "passes": torch.tensor([event.passes or 0.0], dtype=torch.float64),
        "lowest_step": torch.tensor([event.step], dtype=torch.float64) if is_lowest else curve["lowest_step"],
    }
