"""`octavo demo`: the whole road on a small real model and a few plays, with settings that fit a laptop's minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from octavo.commands.finetune import finetune
from octavo.config import DEMO, Config, ModelOptions, RunOptions
from octavo.reporting import Report
from octavo.system import own_command, quoted


def demo(config: Config, *, results: bool = False) -> dict[str, Any]:
    """Runs the demo; `config` was read over the defaults in config.DEMO.

    Without --out or --resume it takes a new folder each time. The last line that it prints is the command to go on
    with, as the shell at hand finds octavo.
    """
    options = config[RunOptions]
    if options.out == Path(DEMO["out"]) and not options.resume:
        config = config.replace(out=_free_folder(options.out))
    done = finetune(config, console=True, results=results, compare_full=True)
    if done["adapter"] is not None:
        chat = quoted(["chat", "--model", config[ModelOptions].model, "--adapter", done["adapter"]])
        with Report(results=results) as report:
            report.result(f"Talk with it: {own_command()} {chat}")
    return done


def _free_folder(wanted: Path) -> Path:
    """`wanted`, or the first of wanted-2, wanted-3, .. that holds no run: an earlier demo is never overwritten."""
    number, folder = 1, wanted
    while (folder / "metrics.jsonl").exists():
        number += 1
        folder = wanted.with_name(f"{wanted.name}-{number}")
    return folder
