"""`octavo demo`: fine-tunes a small real model on a few plays, with settings for minutes on a laptop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from octavo.commands.finetune import finetune
from octavo.config import DEMO, Config, ModelOptions, RunOptions
from octavo.reporting import Report
from octavo.runs.folder import RunFolder
from octavo.system import own_command, quoted


def demo(config: Config, *, results: bool = False) -> dict[str, Any]:
    """Runs the demo; `config` has the defaults of config.DEMO.

    Without --out or --resume each call writes a new folder. The last line of the output is the command to chat with
    the model, as octavo is called in the user's shell.
    """
    options = config[RunOptions]
    if options.out == Path(DEMO["out"]) and not options.resume:
        config = config.replace(out=_free_folder(options.out))
    done = finetune(config, console=True, results=results, compare_full=True)
    if done["adapter"] is not None:
        chat = quoted(["chat", "--model", config[ModelOptions].model, "--adapter", done["adapter"]])
        with Report(results=results) as report:
            report.result(f"Chat with it: {own_command()} {chat}")
    return done


def _free_folder(path: Path) -> Path:
    """`path`, or the first of path-2, path-3, .. without a run, so that no earlier demo is overwritten."""
    number, folder = 1, path
    while RunFolder(folder).metrics.exists():
        number += 1
        folder = path.with_name(f"{path.name}-{number}")
    return folder
