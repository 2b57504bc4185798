"""`octavo demo`: the whole road on a small real model and a few plays, with settings that fit a laptop's minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from octavo.config import DEMO, Config, RunOptions, TrainingData
from octavo.errors import UsageError
from octavo.finetune import finetune


def demo(config: Config) -> dict[str, Any]:
    """Runs the demo; `config` was read over the defaults in config.DEMO.

    Without --out or --resume it takes a new folder each time.
    """
    plays = DEMO["data"]
    if config[TrainingData].data == plays and not Path(plays[0]).is_dir():
        raise UsageError(
            f"The example plays are not at {plays[0]}.",
            hint="Run the demo from a clone of the repository (pip install -e .).",
        )
    options = config[RunOptions]
    if options.out == Path(DEMO["out"]) and not options.resume:
        config = config.replace(out=_free_folder(options.out))
    return finetune(config, console=True, compare_full=True)


def _free_folder(wanted: Path) -> Path:
    """`wanted`, or the first of wanted-2, wanted-3, .. that holds no run: an earlier demo is never overwritten."""
    number, folder = 1, wanted
    while (folder / "metrics.jsonl").exists():
        number += 1
        folder = wanted.with_name(f"{wanted.name}-{number}")
    return folder
