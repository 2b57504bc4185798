"""Writes report.html of a run folder: verdict, curves, results, samples, and the commands to go on with.

The page is self-contained; its content security policy forbids loading resources. All text of the run is escaped.
It has no absolute path, so that it can be shared. Sections without data are omitted, so an interrupted or running run
also has a report.
"""

from __future__ import annotations

from pathlib import Path

from octavo.atomic import atomic_write
from octavo.errors import UsageError
from octavo.html_report.curves import curves
from octavo.html_report.details import facts, ledger_section, settings_section, warnings
from octavo.html_report.elements import page, text
from octavo.html_report.header import header
from octavo.html_report.header import summary as summary
from octavo.html_report.learned import learned_section
from octavo.html_report.next_steps import next_steps
from octavo.html_report.results import perplexities, verdict_section
from octavo.html_report.samples import samples_section
from octavo.html_report.settings import plain_settings
from octavo.reporting import read_events
from octavo.runs.events import Evaluation, last, of_record
from octavo.runs.folder import RunFolder
from octavo.runs.verdict import verdict_of


def write(folder: Path) -> Path:
    """Writes report.html into a run folder and returns its path.

    Reads metrics.jsonl, ledger.json and config.yaml if they exist. Raises UsageError if there is no such folder,
    CheckpointError if it has another format version, and DataError if ledger.json is not JSON. Invalid lines of
    metrics.jsonl are ignored: a killed run may leave one.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder.", hint="Pass the folder of --out.")
    run = RunFolder(folder)
    run.check_format()
    records = read_events(run.metrics)[0] if run.metrics.is_file() else []
    events = [event for record in records if (event := of_record(record)) is not None]
    written = next((str(record["time"]) for record in reversed(records) if "time" in record), None)
    verdict = verdict_of(events)
    content = run.settings.read_text("utf-8", "replace") if run.settings.is_file() else ""
    settings = plain_settings(content)
    name = folder.resolve().name
    sections = [
        header(name, events, verdict, settings, written=written),
        verdict_section(verdict),
        curves(events),
        perplexities(events),
        learned_section(events),
        samples_section(events),
        next_steps(str(folder), settings, finished=last(events, Evaluation) is not None),
        warnings(events),
        ledger_section(run.ledger),
        settings_section(content),
        facts(events),
    ]
    html = page(f"{text(name)} · octavo", sections)
    atomic_write(run.report, html.encode("utf-8", "replace"))
    return run.report
