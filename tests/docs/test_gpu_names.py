"""docs/memory-and-planning.md has the names of all GPUs of `--gpu` and `--pretend`."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from importlib import import_module
from types import ModuleType

import pytest
from tests.docs.pages import ROOT

from octavo.hardware import GPUS, USABLE, gpu_named
from octavo.hardware.pretend import MODELS


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    sys.path.insert(0, str(ROOT / "tools"))
    yield import_module("gpu_names")
    sys.path.remove(str(ROOT / "tools"))


def test_the_names_of_the_page_are_current(script: ModuleType) -> None:
    """If it fails: `python tools/gpu_names.py`."""
    page = script.PAGE.read_text(encoding="utf-8")
    assert script.with_table(page) == page


def test_every_gpu_is_in_the_table_once_by_a_name_that_is_accepted(script: ModuleType) -> None:
    cells = [line.strip("| ").split(" | ") for line in script.table().splitlines()[2:]]
    names = [name for line in cells for name in line[1].split(", ")]
    assert sorted(names) == sorted(GPUS)
    assert [gpu_named(name) for name in names] == names
    assert sorted(name for line in cells for name in line[2].split(", ") if name != "-") == sorted(MODELS)


def test_the_memory_of_a_t4_on_the_pages_is_that_of_the_code() -> None:
    """The memory that PyTorch sees, that of --pretend, and the one that a plan counts on."""
    plan, free = (
        (ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("memory-and-planning.md", "notebooks.md")
    )
    row = next(line for line in plan.splitlines() if line.startswith("| T4 | 16 GB "))
    numbers = [float(number) for number in re.findall(r"[\d.]+(?= GiB)", row)]
    usable = GPUS["T4"].usable_bytes
    assert usable is not None
    assert numbers == [GPUS["T4"].memory_gib, 14.56, MODELS["T4"].memory_gib, usable / 2**30]
    assert MODELS["T4"].memory_gib == pytest.approx(14.56 - 0.5)
    assert f"{100 * USABLE:.0f} %" in plan
    assert "14.56 GiB" in free
    assert "14.6" not in free
