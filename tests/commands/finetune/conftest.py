"""Runs of a second on the tiny models."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from octavo import cli
from octavo.commands.finetune import finetune
from octavo.config import Config

Settings = Callable[..., Config]
Tune = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def settings(tiny_llama: Path, plays: Path) -> Settings:
    """A folder and changes -> the configuration of a short run in float32, where the loss falls fast."""

    def make(out: Path, /, **changes: Any) -> Config:
        values = {
            "model": str(tiny_llama),
            "data": [str(plays / "train")],
            "test_data": [str(plays / "test")],
            "out": str(out),
            "dtype": "float32",
            "seq_len": 32,
            "batch": 4,
            "steps": 6,
            "lr": 0.03,
            "rank": 2,
            "sample_tokens": 4,
            "sample_prompt": ["the king"],
        }
        return Config.read(cli.FINETUNE, {**values, **changes})

    return make


@pytest.fixture(scope="session")
def tune(settings: Settings) -> Tune:
    """Runs a configuration of `settings`, silently, and returns what `--json` prints."""

    def run(out: Path, /, **changes: Any) -> dict[str, Any]:
        return finetune(settings(out, **changes), console=False)

    return run


@pytest.fixture(autouse=True)
def _hears_ctrl_c() -> Iterator[None]:
    """A shell's background job ignores SIGINT, and so would tests that send it to themselves there."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
