"""`octavo tune`: chooses the learning rate and the LoRA rank by short runs within a stated time.

The model is loaded once. Rounds of trials (rounds.py) choose the learning rate and then the rank. Held-out text is
split in two, so that the text that chooses is not the text that the differences are measured on. A file in --out has
each finished trial, so that an interrupted search goes on with --resume.
"""

from __future__ import annotations

import signal
from time import monotonic
from typing import Any

from octavo.atomic import atomic_write
from octavo.commands.tune.outcome import Outcome, loss_of, outcome_of
from octavo.commands.tune.record import Record
from octavo.commands.tune.rounds import Cell
from octavo.commands.tune.search import DEFAULT, prepared_search, run_config, searched
from octavo.commands.tune.trial import Clock
from octavo.config import Config, RunOptions, TrainingData, TuneOptions
from octavo.config.commands import FINETUNE
from octavo.config.section import arguments_of
from octavo.errors import StoppedError, TrainingError, UsageError
from octavo.html_report import search as page
from octavo.intervals import Units
from octavo.reporting import Report
from octavo.runs.folder import RunFolder
from octavo.stopping import StopRequest, stop_signals
from octavo.store.files import lock
from octavo.system import own_command, quoted

MAX_CELLS = 1000


def tune(config: Config, report: Report) -> dict[str, Any]:
    """Runs a search, or goes on with one; prints the cells and the choice; returns the JSON result (`--json`)."""
    options, started = config[TuneOptions], monotonic()
    cells, folder = grid(options), RunFolder(options.out)
    with stop_signals() as signals:
        _check_folder(folder, options, has_data=bool(config[TrainingData].data))
        try:
            with lock(folder.path):
                clock = Clock(started + 60 * options.minutes, signals)
                search = prepared_search(config, cells, report, clock, resume=_resume(options))
                # After the check that a resumed search has the same settings.
                atomic_write(folder.settings, config.replace(resume=False).to_yaml().encode())
                with signals.waits():
                    units = searched(search, cells)
        except StoppedError as error:
            error.message, error.hint = "Stopped; the finished trials are saved.", f"Go on with: {_resume(options)}"
            raise
        except KeyboardInterrupt as error:
            number = signals.received[0] if signals.received else signal.SIGINT
            raise StopRequest(number, f"Stopped. Go on with: {_resume(options)}") from error
    outcome = outcome_of(search.record, *units, default=DEFAULT)
    if outcome is None:
        raise TrainingError(
            "All trials so far diverged: none has a finite loss.", hint="Choose lower --lr, and another --out."
        )
    return _result(config, search.record, outcome, units[0], report)


def grid(options: TuneOptions) -> list[Cell]:
    """All pairs of a learning rate and a rank. UsageError for a value that is none, and for too few or many cells."""
    for rank in options.rank:
        if not (rank.is_integer() and rank >= 1):
            raise UsageError(f"--rank {rank:g} is no positive integer.", hint="Give ranks as 4,16,64.")
    if bad := [lr for lr in options.lr if not 0 < lr < 1e30]:
        raise UsageError(f"--lr {bad[0]:g} is no learning rate.", hint="Give learning rates as 1e-4,3e-4.")
    cells = sorted({Cell(lr, int(rank)) for lr in options.lr for rank in options.rank})
    if not 2 <= len(cells) <= MAX_CELLS:
        raise UsageError(
            f"The grid has {len(cells):,} cells; it needs 2 to {MAX_CELLS:,}.", hint="Set --lr and --rank."
        )
    return cells


def _check_folder(folder: RunFolder, options: TuneOptions, *, has_data: bool) -> None:
    """UsageError for a folder with a run, with a search that is not resumed, or with none to resume."""
    trials = folder.search
    if folder.path.exists() and not folder.path.is_dir():
        raise UsageError(f"--out {folder.path} is not a folder.", hint="Choose another path.")
    if folder.is_run() or folder.contents():
        raise UsageError(f"{folder.path} contains a run.", hint="Choose another --out for the search.")
    if trials.exists() and not options.resume:
        raise UsageError(
            f"{folder.path} contains a search.", hint="Add --resume to go on with it, or choose another --out."
        )
    if options.resume and not trials.exists() and not has_data:
        raise UsageError(f"{folder.path} contains no search to go on with.", hint="Name its folder with --out.")


def _resume(options: TuneOptions) -> str:
    return f"{own_command()} tune --resume {quoted(['--out', options.out])}"


def command_of(config: Config, choice: Cell) -> str:
    """The command that trains with the chosen settings, in the shell of the user."""
    chosen = run_config(config, choice)
    kinds = [kind for kind in FINETUNE if kind is not RunOptions]
    arguments = [argument for kind in kinds for argument in arguments_of(chosen[kind])]
    return f"{own_command()} finetune {quoted(arguments)}"


def _result(config: Config, record: Record, outcome: Outcome, choosing: Units, report: Report) -> dict[str, Any]:
    """Prints the cells, the sentences and the command; writes the page; returns the JSON."""
    losses = {
        one.cell: [(each.steps, loss_of(each, choosing)) for each in record.trials if each.cell == one.cell]
        for one in record.trials
    }
    ordered = sorted(losses, key=lambda cell: (-len(losses[cell]), losses[cell][-1][1] or float("inf")))
    columns = ["learning rate", "rank", "steps", "loss", ""]
    rows = [
        [f"{cell.lr:g}", cell.rank, losses[cell][-1][0], losses[cell][-1][1] or "diverged", _mark(cell, outcome)]
        for cell in ordered
    ]
    report.table("Cells: loss on the text that chooses, in nats per token", columns, rows, result=True)
    sentences, command = outcome.sentences(), command_of(config, outcome.choice)
    for sentence in sentences:
        report.result(sentence)
    report.result(f"Train with it: {command}")
    options = config[TuneOptions]
    if options.report is not None:
        by_name = {str(cell): found for cell, found in losses.items()}
        page.write(options.report, columns, rows, by_name, sentences, command)
        report.result(f"report  {options.report}")
    return {
        "out": str(options.out),
        **outcome.to_dict(),
        "command": command,
        "cells": [
            {"lr": cell.lr, "rank": cell.rank, "trials": [{"steps": n, "loss": loss} for n, loss in losses[cell]]}
            for cell in ordered
        ],
        "seconds": record.spent,
        "report": None if options.report is None else str(options.report),
    }


def _mark(cell: Cell, outcome: Outcome) -> str:
    marks = ["best"] * (cell == outcome.choice) + ["default"] * (cell == outcome.default)
    return ", ".join(marks)
