"""8-bit matmuls in a run: measured once, reported, stored, not used in evaluation; errors of --matmul."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import devices

from octavo.commands.backends import wants_8bit
from octavo.commands.finetune.precision import _measured
from octavo.commands.finetune.prepare import prepare
from octavo.commands.run_plan import planner_for
from octavo.config import Config, MemoryOptions
from octavo.errors import CheckpointError, UsageError
from octavo.hardware import GPUS, Hardware
from octavo.models import Decoder
from octavo.ops.quantize import SCHEMES
from octavo.reporting import Report
from octavo.runs import checkpoint
from octavo.store.sources import FolderSource
from octavo.train.precision import Precision, QuantError, all_8bit, layers, measure_8bit_error

Tune = Callable[..., dict[str, Any]]
Settings = Callable[..., Config]
CPU, OLD, TURING, NEW = (devices.hardware(device) for device in (devices.CPU, devices.V100, devices.T4, devices.H200))


def events(folder: Path, name: str) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == name]


def losses(folder: Path) -> list[float]:
    return [event["loss"] for event in events(folder, "step")]


@pytest.fixture(scope="module")
def use_8bit(tune: Tune, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("eight") / "run"
    tune(out, matmul="8bit", scheme="int8")
    return out


@pytest.fixture(scope="module")
def exact(tune: Tune, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exact") / "run"
    tune(out, scheme="int8")
    return out


def test_a_run_with_8bit_matmuls_reports_errors_and_trains(use_8bit: Path, exact: Path) -> None:
    (event,) = events(use_8bit, "matmul")
    assert event["exact"] == []
    assert len(event["costs"]) == 8  # two blocks of four layers
    assert all(0 < forward < 0.2 for forward, _, _ in event["costs"].values())
    actual, expected = losses(use_8bit), losses(exact)
    assert actual != expected
    assert actual == pytest.approx(expected, rel=0.02)


def test_evaluation_uses_exact_matmuls(use_8bit: Path, exact: Path) -> None:
    """Before training both are the same model; a table computed with 8-bit matmuls would differ."""
    first = [events(folder, "evaluation")[-1]["rows"][0] for folder in (use_8bit, exact)]
    assert first[0]["perplexity"] == first[1]["perplexity"]


def test_on_a_cpu_auto_is_exact(exact: Path) -> None:
    assert events(exact, "matmul") == []


def measured_again(*_: Any, **__: Any) -> None:
    pytest.fail("the error is measured again")


@pytest.fixture
def no_layer_acceptable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enables 8-bit matmuls as on a GPU, with an error limit that no layer is under."""
    monkeypatch.setattr("octavo.commands.finetune.state.wants_8bit", lambda *_: True)
    monkeypatch.setattr("octavo.commands.run_plan.wants_8bit", lambda *_: True)
    monkeypatch.setattr("octavo.train.precision.LIMIT", 0.0)


@pytest.mark.usefixtures("no_layer_acceptable")
def test_layers_over_the_limit_stay_exact_and_a_resumed_run_does_not_measure_again(
    tune: Tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tune(tmp_path / "whole", scheme="int8", checkpoint_every=2)
    tune(tmp_path / "parts", scheme="int8", checkpoint_every=2, stop_after=3)
    (event,) = events(tmp_path / "whole", "matmul")
    assert event["exact"] == list(event["costs"])
    saved = checkpoint.newest(tmp_path / "parts" / "checkpoints", warn=pytest.fail)
    assert saved is not None
    assert saved.state["precision"] == {}
    monkeypatch.setattr(
        "octavo.commands.finetune.precision.measure_8bit_error", lambda *_, **__: pytest.fail("tried again")
    )
    tune(tmp_path / "parts", scheme="int8", checkpoint_every=2, resume=True)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


@pytest.mark.parametrize(
    ("hardware", "times", "message"),
    [(NEW, 2.5, "2.50 times as fast"), (NEW, 0.8, "1.25 times as long"), (TURING, 2.5, "2.50 times as fast")],
)
def test_matmuls_are_exact_on_a_gpu_where_8_bits_are_not_faster(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hardware: Hardware, times: float, message: str
) -> None:
    """The GPU is simulated: only the timing and the measurement are called, both replaced here."""
    forward_only, tried = hardware is TURING, list[Any]()

    def measure_speed(model: Decoder, tokens: int, **named: bool) -> float:
        assert (tokens, named) == (4 * 32, {"forward_only": forward_only})
        return times

    def measure_error(*arguments: Any, **named: bool) -> dict[str, Any]:
        assert named == {"forward_only": forward_only}
        tried.append(arguments)
        return {name: QuantError(0.01, 0.01) for name, _ in layers(arguments[0])}

    monkeypatch.setattr("octavo.commands.finetune.precision.speedup", measure_speed)
    monkeypatch.setattr("octavo.commands.finetune.precision.measure_8bit_error", measure_error)
    monkeypatch.setattr("octavo.commands.finetune.precision.gradient_type", lambda _: torch.int8)
    with Report(console=False, metrics=tmp_path / "metrics") as report:
        run = prepare(settings(tmp_path / "run", scheme="int8", seq_len=32, batch_size=4), report)
        run = replace(run, hardware=hardware)
        precision = _measured(run)
    assert message in (tmp_path / "metrics").read_text()
    assert len(tried) == (1 if times > 1 else 0)
    assert precision == (all_8bit(run.model, forward_only=forward_only) if times > 1 else Precision())


@pytest.mark.usefixtures("no_layer_acceptable")
def test_a_resumed_run_keeps_its_outlier_channels(tune: Tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("octavo.train.precision.LIMIT", 1.0)
    monkeypatch.setattr(
        "octavo.train.precision.QuantError.splits_outliers", property(lambda cost: len(cost.channels) > 0)
    )
    tune(tmp_path / "whole", scheme="int8")
    tune(tmp_path / "parts", scheme="int8", stop_after=3)
    (event,) = events(tmp_path / "whole", "matmul")
    assert event["exact"] == []
    assert event["outliers"].keys() == event["costs"].keys()
    saved = checkpoint.newest(tmp_path / "parts" / "checkpoints", warn=pytest.fail)
    assert saved is not None
    assert saved.state["precision"] == event["outliers"]
    monkeypatch.setattr(
        "octavo.commands.finetune.precision.measure_8bit_error", lambda *_, **__: pytest.fail("tried again")
    )
    tune(tmp_path / "parts", scheme="int8", resume=True)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


@pytest.mark.parametrize(("before", "after", "measured"), [(False, True, 1), (True, False, 0), (False, False, 0)])
def test_a_run_resumed_where_backward_has_8_bits_too_measures_its_errors(
    tune: Tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: bool, after: bool, measured: int
) -> None:
    """`before`, `after`: whether backward has 8-bit matmuls where the run begins, and where it is resumed."""
    out, calls, measure = tmp_path / "run", list[bool](), measure_8bit_error

    def counted(*arguments: Any, forward_only: bool) -> Any:
        calls.append(forward_only)
        return measure(*arguments, forward_only=forward_only)

    monkeypatch.setattr("octavo.commands.finetune.precision.measure_8bit_error", counted)
    for has_backward, options in ((before, {"stop_after": 3}), (after, {"resume": True})):
        for module in ("finetune.precision", "run_plan"):
            monkeypatch.setattr(f"octavo.commands.{module}.backward_8bit", lambda *_, value=has_backward: value)
        tune(out, matmul="8bit", scheme="int8", **options)
        saved = checkpoint.newest(out / "checkpoints", warn=pytest.fail)
        assert saved is not None
        assert saved.state["forward_only"] == (not has_backward)
    assert calls == [not before] + [not after] * measured


def test_a_stopped_run_with_8bit_matmuls_resumes_bit_for_bit(tune: Tune, tmp_path: Path, use_8bit: Path) -> None:
    out = tmp_path / "run"
    tune(out, matmul="8bit", scheme="int8", stop_after=3)
    tune(out, matmul="8bit", scheme="int8", resume=True)
    assert losses(out) == losses(use_8bit)
    adapters = [(folder / "adapter" / "adapter_model.safetensors").read_bytes() for folder in (out, use_8bit)]
    assert adapters[0] == adapters[1]


def test_matmul_is_part_of_the_identity_of_a_run(tune: Tune, tmp_path: Path) -> None:
    out = tmp_path / "run"
    tune(out, matmul="8bit", scheme="int8", stop_after=2)
    with pytest.raises(CheckpointError, match="matmul: '8bit' in the checkpoint, 'exact' now"):
        tune(out, matmul="exact", scheme="int8", resume=True)
    tune(out, matmul="exact", scheme="int8", resume=True, force=True)
    saved = checkpoint.newest(out / "checkpoints", warn=pytest.fail)
    assert saved is not None
    assert saved.state["precision"] is None


@pytest.mark.parametrize(("hardware", "gpu", "expected"), [
    (CPU, None, False), (CPU, "RTX 4090", True), (CPU, "RTX 3090", True), (CPU, "T4", True),
    (CPU, "P100", False), (OLD, None, False), (NEW, None, True),
])  # fmt: skip
def test_auto_uses_8bit_matmuls_on_gpus_that_support_them(
    hardware: Hardware, gpu: str | None, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("octavo.commands.backends.kernels_disabled_reason", lambda _: "")
    assert wants_8bit(MemoryOptions(), hardware, GPUS[gpu] if gpu else None) is expected
    assert not wants_8bit(MemoryOptions(matmul="exact"), hardware, GPUS[gpu] if gpu else None)


def test_without_kernels_auto_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not wants_8bit(MemoryOptions(kernels=False), NEW)
    monkeypatch.setattr("octavo.commands.backends.kernels_disabled_reason", lambda _: "Triton is not installed")
    assert not wants_8bit(MemoryOptions(), NEW)


def test_matmul_8bit_is_an_error_on_an_old_gpu_but_not_on_a_cpu() -> None:
    with pytest.raises(UsageError, match="Tesla V100-SXM2-16GB has no 8-bit matmuls"):
        wants_8bit(MemoryOptions(matmul="8bit"), OLD)
    assert wants_8bit(MemoryOptions(matmul="8bit"), CPU)
    assert wants_8bit(MemoryOptions(matmul="8bit"), NEW)


@pytest.mark.parametrize("hardware", [NEW, CPU])
def test_a_plan_has_the_matmuls_of_the_gpu_that_it_is_for(hardware: Hardware) -> None:
    """Not those of the GPU of this machine."""
    assert wants_8bit(MemoryOptions(), hardware, GPUS["RTX 4090"])
    assert not wants_8bit(MemoryOptions(), hardware, GPUS["P100"])
    assert wants_8bit(MemoryOptions(), OLD, GPUS["RTX 4090"])


def test_a_plan_with_8bit_matmuls_takes_no_more_memory(settings: Settings, tiny_llama: Path) -> None:
    plans = {}
    for matmul in ("exact", "8bit"):
        config = settings(Path("unused"), matmul=matmul, seq_len=32)
        planner = planner_for(config, FolderSource(tiny_llama), SCHEMES["int8"], NEW, GPUS["H100"])
        plans[matmul] = planner.smallest()
    assert plans["8bit"].peak_bytes <= plans["exact"].peak_bytes
