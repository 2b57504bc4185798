"""The commands to go on with, at the end of a report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath

from octavo.html_report.elements import section, text
from octavo.html_report.paths import last_name
from octavo.system import quoted


def next_steps(run: str, settings: Mapping[str, str], *, finished: bool) -> str:
    """Commands for a run at the path `run`, which is as --out was given."""
    model = settings.get("model")
    if not model:
        return ""
    out = last_name(run)
    base = ["--model", last_name(model), *_option(settings, "revision"), *_option(settings, "scheme")]
    base += ["--allow-pickle"] if settings.get("allow_pickle") == "true" else []
    tuned = quoted([*base, "--adapter", out])
    commands = (
        [
            f'octavo generate {tuned} --prompt "Once upon a time"',
            f"octavo chat {tuned}",
            f"octavo serve {quoted([*base, '--adapter', f'{PurePath(out).name}={out}'])}",
            f"octavo evaluate {tuned} other-text.txt",
            f"octavo compare {quoted([out])} runs/other --report compare.html",
        ]
        if finished
        else [f"octavo finetune --resume {quoted(['--out', out])}"]
    )
    is_shortened = out != run or last_name(model) != model
    caption = (
        "The two dots stand for a folder that is not named, so that this page can be shared."
        if is_shortened
        else "Run them in the folder in which this run was started."
    )
    lines = "\n".join(text(command) for command in commands)
    return section("Go on", f'<div class="card"><pre>{lines}</pre></div><p class="caption">{text(caption)}</p>')


def _option(settings: Mapping[str, str], name: str) -> list[str]:
    value = settings.get(name)
    return [f"--{name.replace('_', '-')}", value] if value and value not in ("null", "~", "auto") else []
