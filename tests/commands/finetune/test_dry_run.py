"""rehearse.py: what would fail after hours fails at once, and a rehearsal changes nothing."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import octavo.commands.finetune as package
from octavo.commands.finetune.dry_run import rehearse
from octavo.commands.finetune.prepare import prepare
from octavo.commands.finetune.state import Run, state_of
from octavo.commands.plan import FittedPlan
from octavo.config import Config
from octavo.data.loader import Position
from octavo.data.packing import IGNORE_INDEX, Row
from octavo.errors import CheckpointError, TrainingError
from octavo.layers.context import Save
from octavo.objective import loss_of
from octavo.reporting import Report
from octavo.store import checkpoint, files
from octavo.train import step
from octavo.train.memory import MemoryPlan

Settings = Callable[..., Config]
Tune = Callable[..., dict[str, Any]]

module = import_module("octavo.commands.finetune.dry_run")  # the package has a function of its name
SHORT = {"steps": 4, "accumulate": 2, "dropout": 0.2, "checkpoint_every": 2, "eval_every": 2, "sample_every": 2}
NARROW = MemoryPlan((Save.INPUT,) * 2, 1, 2**28, None)
TIMES = ("time", "tokens_per_second", "peak_bytes")


def events(folder: Path) -> list[dict[str, Any]]:
    """What was recorded, but for what depends on the clock and the folder."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = [{key: value for key, value in event.items() if key not in TIMES} for event in found]
    text = json.dumps([event for event in kept if event["event"] != "say"])
    recorded: list[dict[str, Any]] = json.loads(text.replace(str(folder), "RUN"))
    return recorded


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def results(folder: Path) -> dict[str, bytes]:
    """Everything trained, as it was saved."""
    return {name: content for name, content in contents(folder).items() if name.endswith(".safetensors")}


@pytest.fixture
def begun(settings: Settings, tmp_path: Path) -> Iterator[Run]:
    """A run that is ready, as if it had been resumed in the middle."""
    with Report(console=False) as report:
        run = prepare(settings(tmp_path / "run", **SHORT), report)
        run.found.done, run.found.position = 2, Position(1, 3)
        yield run


def fails(monkeypatch: pytest.MonkeyPatch, times: float) -> list[int]:
    """Has so many passes through the model run out of memory; the rows of each pass as they come."""
    seen: list[int] = []

    def loss(model: Any, inputs: Any, *, save: Any, offload: bool) -> Tensor:
        seen.append(len(inputs.ids))
        if len(seen) <= times:
            raise torch.OutOfMemoryError("Tried to allocate 20.00 MiB.")
        return loss_of(model, inputs, save=save, offload=offload)

    monkeypatch.setattr(step, "loss_of", loss)
    return seen


def fills_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """While a rehearsal saves; it has written a file by then."""
    write = files.durable_write

    def full(path: Path, content: bytes) -> None:
        write(path, content)
        if ".rehearsal" in path.parts:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "durable_write", full)


def noting(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps that were behind a run when it rehearsed, as it does."""
    seen: list[int] = []

    def noted(run: Run) -> None:
        seen.append(run.found.done)
        rehearse(run)

    monkeypatch.setattr(package, "rehearse", noted)
    return seen


def test_a_rehearsal_takes_a_step_an_evaluation_and_a_save_in_this_order(
    begun: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[tuple[str, Any]] = []

    def noted(name: str, real: Callable[..., Any], told: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            done.append((name, told(*arguments, **named)))
            return real(*arguments, **named)

        return call

    whole = module.gradients, module.score, checkpoint.save
    monkeypatch.setattr(module, "gradients", noted("step", whole[0], lambda trainer, chosen, *_, **__: len(chosen)))
    monkeypatch.setattr(module, "score", noted("score", whole[1], lambda model, rows, **_: (model.training, len(rows))))
    monkeypatch.setattr(checkpoint, "save", noted("save", whole[2], lambda folder, step, **_: folder.name))
    rehearse(begun)
    steps = [("step", 1)] * 2  # of rows with one document each, and of packed ones
    assert done == [*steps, ("score", (False, min(4, len(begun.test_rows)))), ("save", ".rehearsal")]
    done.clear()
    begun.micro_step.record = True  # a step is launched once, then recorded
    rehearse(begun)
    assert [name for name, _ in done] == [*["step"] * 4, "score", "save"]


@dataclass(frozen=True)
class Kinds:
    """Rows of one document, of one and padding, and packed ones; of each pair the second one is learned."""

    one: tuple[Row, Row]
    padded: tuple[Row, Row]
    packed: tuple[Row, Row]


@pytest.fixture
def kinds() -> Kinds:
    def pair(documents: list[int]) -> tuple[Row, Row]:
        ids, document = np.arange(8, dtype=np.int32), np.array(documents, dtype=np.int32)
        silent = np.full(8, IGNORE_INDEX, dtype=np.int32)
        loud = np.where(document < 0, IGNORE_INDEX, ids)
        return Row(ids, silent, ids, document, ("f:1",)), Row(ids, loud, ids, document, ("f:2",))

    return Kinds(pair([0] * 8), pair([0] * 5 + [-1] * 3), pair([0, 0, 0, 1, 1, 1, 1, -1]))


def test_rows_of_one_document_and_packed_ones_are_both_tried(begun: Run, kinds: Kinds) -> None:
    """They take other kernels on a card. Those with targets, since backward goes from these."""
    for pairs, expected in (
        ((kinds.one, kinds.packed), [kinds.packed[1], kinds.one[1]]),
        ((kinds.packed, kinds.padded), [kinds.packed[1], kinds.padded[1]]),
        ((kinds.packed, kinds.padded, kinds.one), [kinds.packed[1], kinds.one[1]]),  # most is learned from the last
        ((kinds.packed,), [kinds.packed[1]]),
        ((kinds.padded,), [kinds.padded[1]]),
    ):
        begun.train.rows[:] = [row for pair in pairs for row in (pair[0], pair[1], pair[0])]
        batches = list(module.one_of_each_kind(begun))
        assert len(batches) == len(expected)
        for batch in batches:
            assert len(batch.ids) == 4
            assert batch.trained_tokens == 4 * int((batch.labels[0] != IGNORE_INDEX).sum()) > 0
            assert all(torch.equal(batch.labels[0], row) for row in batch.labels)
        tried = [batch.document[0].tolist() for batch in batches]
        assert sorted(tried) == sorted(row.document.tolist() for row in expected)


def test_it_saves_all_that_a_checkpoint_holds(begun: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[Any] = []
    monkeypatch.setattr(checkpoint, "save", lambda folder, step, **named: saved.append(named))
    rehearse(begun)
    tensors, state = state_of(begun)
    assert saved[0]["state"] == state
    assert saved[0]["tensors"].keys() == tensors.keys() >= {"adapter", "optimizer"}


def test_it_leaves_the_run_as_it_was(begun: Run) -> None:
    def state() -> tuple[Any, ...]:
        parameters = {name: p.detach().clone() for name, p in begun.trainer.parameters.items()}
        tensors = {**parameters, **{f"optimizer.{k}": v for k, v in begun.trainer.optimizer.state().items()}}
        bits = {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}
        return bits, repr(begun.found), begun.trainer.scaler.state(), begun.micro_step.plan, begun.model.training

    before, files = state(), contents(begun.folder)
    rehearse(begun)
    assert state() == before
    assert not begun.model.training
    assert contents(begun.folder) == files
    assert not (begun.folder / ".rehearsal").exists()
    for group in begun.trainer.optimizer.groups:
        assert group.values.grad is not None
        assert not group.values.grad.any()
    for name, parameter in begun.trainer.parameters.items():
        assert parameter.grad is not None, name


def test_what_a_killed_rehearsal_left_behind_is_cleared(begun: Run) -> None:
    (left := begun.folder / ".rehearsal" / "step-00000000").mkdir(parents=True)
    (left / "state.json").write_text("half")
    rehearse(begun)
    assert not (begun.folder / ".rehearsal").exists()


@pytest.mark.parametrize("changes", [{}, {"scheme": "none", "dtype": "float16", "accumulate": 1, "keep": "last"}])
def test_a_run_with_a_rehearsal_is_the_run_without_one(
    tune: Tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    """Bit for bit, though dropout and samples draw random numbers."""
    rehearsed = noting(monkeypatch)
    tune(tmp_path / "with", **{**SHORT, **changes})
    monkeypatch.setattr(package, "rehearse", lambda run: None)
    tune(tmp_path / "without", **{**SHORT, **changes})
    assert rehearsed == [0]
    assert events(tmp_path / "with") == events(tmp_path / "without")
    assert results(tmp_path / "with") == results(tmp_path / "without")
    assert contents(tmp_path / "with").keys() == contents(tmp_path / "without").keys()


def test_a_run_that_could_not_save_stops_before_it_trains(
    tune: Tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        fills_the_disk(patch)
        with pytest.raises(CheckpointError, match="the disk is full") as caught:
            tune(tmp_path / "run", **SHORT)
    assert "Free disk space" in caught.value.hint
    assert contents(tmp_path / "run").keys() <= {"metrics.jsonl"}
    tune(tmp_path / "run", **SHORT, resume=True)
    tune(tmp_path / "whole", **SHORT)
    assert results(tmp_path / "run") == results(tmp_path / "whole")


def test_a_resumed_run_that_could_not_save_loses_nothing(
    tune: Tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tune(tmp_path / "run", **SHORT, stop_after=2)
    before = contents(tmp_path / "run")
    with monkeypatch.context() as patch:
        fills_the_disk(patch)
        with pytest.raises(CheckpointError, match="the disk is full"):
            tune(tmp_path / "run", **SHORT, resume=True)
    after = contents(tmp_path / "run")
    assert {**after, "metrics.jsonl": b""} == {**before, "metrics.jsonl": b""}
    assert [e for e in events(tmp_path / "run") if e["event"] == "step"][-1]["step"] == 2
    tune(tmp_path / "run", **SHORT, resume=True)
    tune(tmp_path / "whole", **SHORT)
    assert results(tmp_path / "run") == results(tmp_path / "whole")


def test_a_plan_that_gives_way_leaves_the_next_to_be_rehearsed(begun: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it: what went well with the first plan says nothing of the second."""
    monkeypatch.setattr(begun.micro_step, "_cheaper", lambda plan: NARROW)
    seen = fails(monkeypatch, 1)
    rehearse(begun)
    assert begun.micro_step.plan == NARROW
    assert seen == [4] + 16 * [1]  # the pass that failed; two batches by rows; both again


def test_a_plan_that_does_not_hold_gives_way_before_the_run_begins(
    tune: Tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    still = {**SHORT, "dropout": 0.0, "steps": 2}  # a mask would be another for other rows
    monkeypatch.setattr(FittedPlan, "cheaper", lambda self, plan: NARROW)
    seen = fails(monkeypatch, 1)
    tune(tmp_path / "run", **still)
    assert seen[:2] == [4, 1]
    warnings = [event["text"] for event in events(tmp_path / "run") if event["event"] == "warn"]
    assert len(warnings) == 1
    assert "1 rows a pass" in warnings[0]
    recorded = [event["event"] for event in events(tmp_path / "run")]
    assert recorded.index("warn") < recorded.index("hardware")
    monkeypatch.undo()
    tune(tmp_path / "whole", **still)
    losses = [[e["loss"] for e in events(tmp_path / n) if e["event"] == "step"] for n in ("run", "whole")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_run_that_no_plan_fits_ends_before_it_begins(
    tune: Tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FittedPlan, "cheaper", lambda self, plan: NARROW if plan != NARROW else None)
    seen = fails(monkeypatch, float("inf"))
    with pytest.raises(TrainingError, match="does not fit into the card's memory"):
        tune(tmp_path / "run", **SHORT)
    assert seen == [4, 1]
    assert contents(tmp_path / "run").keys() <= {"metrics.jsonl"}


def test_a_resumed_run_rehearses_too(tune: Tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tune(tmp_path / "run", **SHORT, stop_after=2)
    done = noting(monkeypatch)
    tune(tmp_path / "run", **SHORT, resume=True)
    assert done == [2]  # with what it has found: the state that is saved is one of the middle of a run


def test_without_held_out_text_there_is_no_evaluation(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "score", pytest.fail)
    with Report(console=False) as report:
        rehearse(prepare(settings(tmp_path / "run", test_data=[], test_fraction=0.0), report))
