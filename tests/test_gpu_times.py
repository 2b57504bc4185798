"""docs/design/gpu-times.md: its tables are those that benchmarks/gpu_times.py makes now."""

from __future__ import annotations

import csv
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

from octavo.hardware import LAUNCH_SECONDS

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    sys.path.insert(0, str(BENCHMARKS))
    yield import_module("gpu_times")
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def page(script: ModuleType) -> str:
    return str(script.PAGE.read_text(encoding="utf-8"))


def test_the_rates_of_the_page_are_current(script: ModuleType, page: str) -> None:
    assert f"<!-- rates -->\n{script.rates_table()}\n<!-- end of rates -->" in page


def test_the_page_has_a_row_of_the_job_for_every_gpu(script: ModuleType, page: str) -> None:
    table = page.partition("<!-- job -->\n")[2].partition("\n<!-- end of job -->")[0]
    assert table.startswith(script.JOB)
    assert [line.split(" | ")[0][2:] for line in table.removeprefix(script.JOB).splitlines()] == [*script.NAMES]


def test_the_minutes_of_the_job_are_the_same_on_the_page_of_measurements(page: str) -> None:
    table = page.partition("<!-- job -->\n")[2].partition("\n<!-- end of job -->")[0]
    minutes = {line.split(" | ")[0][2:]: line.split(" | ")[-1][:-2] for line in table.splitlines()[2:]}
    measured = (BENCHMARKS.parent / "docs/measured.md").read_text(encoding="utf-8")
    said = re.findall(r"([\d.]+ to [\d.]+) (?:minutes )?on an? ((?:RTX|GTX|Quadro|T4|P100)[\w ]*)", measured)
    assert len(said) == 5
    assert {name: minutes[name] for _, name in said} == {name: text for text, name in said}


@pytest.mark.parametrize("name", ["RTX 5090", "RTX A6000"])
def test_the_job_of_the_page_is_current(script: ModuleType, page: str, name: str) -> None:
    """The GPUs on which the plan takes the fewest simulations."""
    assert f"\n{script.job_row(name)}\n" in page


@pytest.mark.exhaustive
def test_all_tables_of_the_page_are_current(script: ModuleType, page: str) -> None:
    job = script.JOB + "\n".join(script.job_row(name) for name in script.NAMES)
    assert script.with_tables(page, {"steps": script.steps_table(), "job": job}) == page


def _waiting(model: str) -> tuple[float, float]:
    """Seconds a kernel by which the measured step of a model was longer than the forecast one, and its width."""
    import torch

    from octavo.layers.context import Save
    from octavo.train.precision import all_8bit
    from octavo_method import planner_of

    with (BENCHMARKS / "plan_families.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["model"] == model]
    row = next(row for row in rows if not row["document"] and not row["budget_gib"] and row["matmul"] == "8bit")
    made = planner_of(
        model, row["scheme"], dtype=torch.bfloat16, tiny=False, batch=int(row["batch"]), seq_len=int(row["seq_len"])
    )
    made = replace(made, precision=all_8bit(made.model))
    forecast = made._forecast(int(row["rows"]), (Save.ALL,) * len(made.model.blocks), False, int(row["transposed"]))
    micro_batches = math.ceil(int(row["batch"]) / int(row["rows"]))
    late = float(row["seconds"]) - float(row["forecast_seconds"])
    return late / (micro_batches * forecast.launches), made.model.config.width


NARROW = (
    "gpt2-xl-20", "olmo-2-1b", "granite-3.1-2b-16", "llama-3.2-1b", "ministral-3-3b-8", "qwen2.5-1.5b-16",
    "qwen3-1.7b-14", "smollm3-3b-12", "gemma-3-1b", "phi-4-mini-8", "pythia-1.4b", "gpt-neo-1.3b", "gemma-3-4b-6",
)  # fmt: skip


@pytest.mark.usefixtures("script")
@pytest.mark.parametrize(
    "model", [*NARROW[:2], *(pytest.param(each, marks=pytest.mark.exhaustive) for each in NARROW[2:])]
)
def test_kernels_of_narrow_models_waited_as_long_as_the_range_says(model: str) -> None:
    seconds, width = _waiting(model)
    assert width < 4096
    assert 0.9 * LAUNCH_SECONDS[0] <= seconds <= LAUNCH_SECONDS[1]


def test_a_table_is_written_between_its_markers(script: ModuleType) -> None:
    page = "before\n<!-- a -->\nold\n<!-- end of a -->\nafter\n"
    assert script.with_tables(page, {"a": "new"}) == "before\n<!-- a -->\nnew\n<!-- end of a -->\nafter\n"
    with pytest.raises(AssertionError):
        script.with_tables(page, {"b": "new"})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("FOO", "octavo has no data of the GPU 'FOO'. Supported are B200, H200, "),
        ("RXT 3060", "octavo has no data of the GPU 'RXT 3060'. Similar names: RTX 3060"),
        ("A100", "'A100' can be several GPUs. Use one of A100 40GB, A100 80GB, A100 80GB PCIe."),
        (
            "5060 Ti",
            "the RTX 5060 Ti is not known, as it has several sizes. Use one of RTX 5060 Ti 16GB, ",
        ),
    ],
)
def test_a_gpu_without_a_row_of_the_job_is_an_error(
    script: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    message: str,
) -> None:
    """Also together with a GPU that has one, and before any table is made."""
    monkeypatch.setattr(script, "rates_table", lambda: pytest.fail("a table was made"))
    monkeypatch.setattr(sys, "argv", ["gpu_times.py", "--only", "T4", name])
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert "--only: " in error
    assert message in error


def test_a_gpu_with_a_row_of_the_job_has_any_of_its_names(script: ModuleType) -> None:
    assert [script.gpu_key(name) for name in ("5060ti 16gb", "1080Ti", *script.NAMES)] == [
        "RTX 5060 Ti 16GB", "GTX 1080 Ti", *script.NAMES,
    ]  # fmt: skip
