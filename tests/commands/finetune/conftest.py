"""Runs of a second on the tiny models."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from octavo.commands.finetune import finetune
from octavo.config import Config
from octavo.config import commands as sections

Settings = Callable[..., Config]
Tune = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def settings(tiny_llama: Path, plays: Path) -> Settings:
    """A function of a folder and changes: the configuration of a short run in float32 whose loss falls fast."""

    def make(out: Path, /, **changes: Any) -> Config:
        values = {
            "model": str(tiny_llama),
            "data": [str(plays / "train")],
            "test_data": [str(plays / "test")],
            "out": str(out),
            "dtype": "float32",
            "seq_len": 32,
            "batch_size": 4,
            "steps": 6,
            "lr": 0.03,
            "rank": 2,
            "probes": False,  # tests/commands/finetune/test_probes.py has them
            "sample_tokens": 4,
            "sample_prompt": ["the king"],
        }
        return Config.read(sections.FINETUNE, {**values, **changes})

    return make


@pytest.fixture(scope="session")
def tune(settings: Settings) -> Tune:
    """Runs a configuration of `settings` without output, and returns the JSON result."""

    def run(out: Path, /, **changes: Any) -> dict[str, Any]:
        return finetune(settings(out, **changes), console=False)

    return run


@pytest.fixture(autouse=True)
def _hears_ctrl_c() -> Iterator[None]:
    """Restores SIGINT: a shell's background jobs ignore it, and some tests send it to their own process."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
