"""commands/finetune/dry_run.py: errors appear before training, and a dry run changes nothing."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import octavo.commands.finetune as package
from octavo import metrics
from octavo.commands.finetune import measure
from octavo.commands.finetune.dry_run import dry_run
from octavo.commands.finetune.prepare import prepare
from octavo.commands.finetune.state import Run, contents_of
from octavo.commands.run_plan import FittedPlan
from octavo.config import Config
from octavo.data.loader import Position
from octavo.data.packing import IGNORE_INDEX, Row
from octavo.errors import CheckpointError, TrainingError
from octavo.layers.context import Save
from octavo.objective import next_token_loss
from octavo.reporting import Report
from octavo.runs import checkpoint
from octavo.store import files
from octavo.train import step
from octavo.train.memory import MemoryPlan

Settings = Callable[..., Config]
Tune = Callable[..., dict[str, Any]]

module = import_module("octavo.commands.finetune.dry_run")  # the package has a function of its name
SHORT = {
    "steps": 4,
    "batch_size": 8,
    "micro_batch_size": 4,
    "dropout": 0.2,
    "checkpoint_every": 2,
    "eval_every": 2,
    "sample_every": 2,
}
NARROW = MemoryPlan((Save.INPUT,) * 2, 1, 2**28, None)
TIMES = ("time", "tokens_per_second", "peak_bytes")


def events(folder: Path) -> list[dict[str, Any]]:
    """The recorded events, without values that depend on the time or the folder."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    stable = [{key: value for key, value in event.items() if key not in TIMES} for event in lines]
    text = json.dumps([event for event in stable if event["event"] != "say"])
    recorded: list[dict[str, Any]] = json.loads(text.replace(str(folder), "RUN"))
    return recorded


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def results(folder: Path) -> dict[str, bytes]:
    """The contents of all safetensors files."""
    return {name: content for name, content in contents(folder).items() if name.endswith(".safetensors")}


@pytest.fixture
def prepared_run(settings: Settings, tmp_path: Path) -> Iterator[Run]:
    """A prepared run with the progress of a resumed one."""
    with Report(console=False) as report:
        run = prepare(settings(tmp_path / "run", **SHORT), report)
        run.state.done, run.state.position = 2, Position(1, 3)
        yield run


def fails(monkeypatch: pytest.MonkeyPatch, times: float) -> list[int]:
    """Makes the first `times` forward passes run out of memory; returns the rows of each pass."""
    seen: list[int] = []

    def loss(decoder: Any, inputs: Any, options: Any) -> Tensor:
        seen.append(len(inputs.ids))
        if len(seen) <= times:
            raise torch.OutOfMemoryError("Tried to allocate 20.00 MiB.")
        return next_token_loss(decoder, inputs, options)

    monkeypatch.setattr(step.EagerStep, "__init__", with_objective(loss))
    return seen


def with_objective(objective: Any) -> Callable[..., None]:
    """The initializer of an eager step whose objective is replaced."""

    def made(self: Any, decoder: Any, options: Any, _: Any, rows: int) -> None:
        self.decoder, self.options, self.objective, self.rows = decoder, options, objective, rows

    return made


def fills_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the disk full during the checkpoint of a dry run, after its first file."""
    write = files.durable_write

    def full(path: Path, content: bytes) -> None:
        write(path, content)
        if ".dry_run" in path.parts:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "durable_write", full)


def record_dry_runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Records the finished steps of a run at each dry run."""
    seen: list[int] = []

    def recording(run: Run) -> None:
        seen.append(run.state.done)
        dry_run(run)

    monkeypatch.setattr(package, "dry_run", recording)
    return seen


def test_a_dry_run_is_a_step_an_evaluation_and_a_checkpoint_in_this_order(
    prepared_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[tuple[str, Any]] = []

    def recording(name: str, real: Callable[..., Any], describe: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            done.append((name, describe(*arguments, **options)))
            return real(*arguments, **options)

        return call

    originals = module.accumulate_gradients, module.score, checkpoint.save
    monkeypatch.setattr(
        module, "accumulate_gradients", recording("step", originals[0], lambda trainer, batch, *_, **__: len(batch.ids))
    )
    monkeypatch.setattr(
        module, "score", recording("score", originals[1], lambda model, rows, **_: (model.training, len(rows)))
    )
    monkeypatch.setattr(
        checkpoint, "save", recording("save", originals[2], lambda folder, step, contents, **_: folder.name)
    )
    dry_run(prepared_run)
    steps = [("step", 4)] * 2  # of rows with one document each, and of packed ones
    assert done == [*steps, ("score", (False, min(4, len(prepared_run.test_rows)))), ("save", ".dry_run")]
    done.clear()
    monkeypatch.setattr(step, "GraphStep", lambda eager, *_, **__: eager)
    prepared_run.micro_step.graphs = True  # a step runs eagerly once, then is captured
    dry_run(prepared_run)
    assert [name for name, _ in done] == [*["step"] * 4, "score", "save"]


@dataclass(frozen=True)
class Kinds:
    """Rows of one document, of one document and padding, and of several; the second of each pair has targets."""

    one: tuple[Row, Row]
    padded: tuple[Row, Row]
    packed: tuple[Row, Row]


@pytest.fixture
def kinds() -> Kinds:
    def rows_of(documents: list[int]) -> tuple[Row, Row]:
        ids, document = np.arange(8, dtype=np.int32), np.array(documents, dtype=np.int32)
        silent = np.full(8, IGNORE_INDEX, dtype=np.int32)
        loud = np.where(document < 0, IGNORE_INDEX, ids)
        return Row(ids, silent, ids, document, ("f:1",), (0,)), Row(ids, loud, ids, document, ("f:2",), (0, 1))

    return Kinds(rows_of([0] * 8), rows_of([0] * 5 + [-1] * 3), rows_of([0, 0, 0, 1, 1, 1, 1, -1]))


def test_rows_of_one_document_and_packed_rows_are_both_run(prepared_run: Run, kinds: Kinds) -> None:
    """They use different kernels on a GPU. Rows with targets are chosen, because only these have a backward."""
    for row_pairs, expected in (
        ((kinds.one, kinds.packed), [kinds.packed[1], kinds.one[1]]),
        ((kinds.packed, kinds.padded), [kinds.packed[1], kinds.padded[1]]),
        ((kinds.packed, kinds.padded, kinds.one), [kinds.packed[1], kinds.one[1]]),  # the last one has the most targets
        ((kinds.packed,), [kinds.packed[1]]),
        ((kinds.padded,), [kinds.padded[1]]),
    ):
        prepared_run.train.rows[:] = [row for rows_of in row_pairs for row in (rows_of[0], rows_of[1], rows_of[0])]
        batches = list(module.batch_of_each_kind(prepared_run))
        assert len(batches) == len(expected)
        for batch in batches:
            assert len(batch.ids) == 4
            assert batch.trained_tokens == 4 * int((batch.labels[0] != IGNORE_INDEX).sum()) > 0
            assert all(torch.equal(batch.labels[0], row) for row in batch.labels)
        tried = [batch.piece[0].tolist() for batch in batches]
        assert sorted(tried) == sorted(row.piece.tolist() for row in expected)


def test_the_packed_rows_of_a_dry_run_have_the_most_documents(prepared_run: Run, kinds: Kinds) -> None:
    """Each takes memory in the backward of attention; a row without targets would skip backward."""
    two, ids = kinds.packed[1], np.arange(8, dtype=np.int32)
    four = np.array([0, 1, 2, 2, 3, 3, 3, -1], dtype=np.int32)
    one_target, none = (np.where(ids == at, ids, IGNORE_INDEX).astype(np.int32) for at in (3, -1))
    more, silent = (replace(two, piece=four, labels=labels) for labels in (one_target, none))
    for rows in ([two, more, silent], [silent, more, two]):
        prepared_run.train.rows[:] = rows
        (batch,) = module.batch_of_each_kind(prepared_run)
        assert batch.piece[0].tolist() == four.tolist()
        assert batch.trained_tokens == len(batch.ids)


def test_a_dry_run_saves_all_contents_of_a_checkpoint(prepared_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[Any] = []
    monkeypatch.setattr(checkpoint, "save", lambda folder, step, contents, **_: saved.append(contents))
    dry_run(prepared_run)
    contents = contents_of(prepared_run)
    assert saved[0].state == contents.state
    assert saved[0].tensors.keys() == contents.tensors.keys() >= {"optimizer"}
    assert saved[0].adapters.keys() == contents.adapters.keys() >= {"adapter"}


def test_a_dry_run_does_not_change_the_run(prepared_run: Run) -> None:
    def state() -> tuple[Any, ...]:
        parameters = {name: p.detach().clone() for name, p in prepared_run.trainer.parameters.items()}
        tensors = {**parameters, **{f"optimizer.{k}": v for k, v in prepared_run.trainer.optimizer.state().items()}}
        bits = {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}
        return (
            bits,
            repr(prepared_run.state),
            prepared_run.trainer.scaler.state(),
            prepared_run.micro_step.plan,
            prepared_run.model.training,
        )

    before, files = state(), contents(prepared_run.folder.path)
    dry_run(prepared_run)
    assert state() == before
    assert not prepared_run.model.training
    assert contents(prepared_run.folder.path) == files
    assert not (prepared_run.folder.path / ".dry_run").exists()
    for group in prepared_run.trainer.optimizer.groups:
        assert group.values.grad is not None
        assert not group.values.grad.any()
    for name, parameter in prepared_run.trainer.parameters.items():
        assert parameter.grad is not None, name


def test_the_files_of_a_killed_dry_run_are_removed(prepared_run: Run) -> None:
    (left := prepared_run.folder.path / ".dry_run" / "step-00000000").mkdir(parents=True)
    (left / "state.json").write_text("half")
    dry_run(prepared_run)
    assert not (prepared_run.folder.path / ".dry_run").exists()


@pytest.mark.parametrize("changes", [{}, {"scheme": "none", "dtype": "float16", "batch_size": 4, "keep": "last"}])
def test_a_run_with_and_without_a_dry_run_is_the_same(
    tune: Tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    """Bit for bit, although dropout and samples use random numbers."""
    dry_runs = record_dry_runs(monkeypatch)
    tune(tmp_path / "with", **{**SHORT, **changes})
    monkeypatch.setattr(package, "dry_run", lambda run: None)
    tune(tmp_path / "without", **{**SHORT, **changes})
    assert dry_runs == [0]
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


def test_after_out_of_memory_the_dry_run_repeats_with_the_next_plan(
    prepared_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it: a success with the first plan does not imply one with the second."""
    monkeypatch.setattr(prepared_run.micro_step, "_cheaper", lambda plan: NARROW)
    seen = fails(monkeypatch, 1)
    dry_run(prepared_run)
    assert prepared_run.micro_step.plan == NARROW
    assert seen == [4] + 8 * [1] + 2 * [1]  # the pass that failed; two batches row by row; both again


def test_a_plan_that_does_not_fit_is_replaced_before_the_run_starts(
    tune: Tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    still = {**SHORT, "dropout": 0.0, "steps": 2}  # a mask would be another for other rows
    monkeypatch.setattr(FittedPlan, "cheaper", lambda self, plan: NARROW)
    seen = fails(monkeypatch, 1)
    tune(tmp_path / "run", **still)
    assert seen[:2] == [4, 1]
    recorded = events(tmp_path / "run")
    [place] = [n for n, event in enumerate(recorded) if "micro-batches of 1 sequence," in event.get("text", "")]
    assert recorded[place]["event"] == "warn"
    assert place < [event["event"] for event in recorded].index("hardware")
    monkeypatch.undo()
    tune(tmp_path / "whole", **still)
    losses = [[e["loss"] for e in events(tmp_path / n) if e["event"] == "step"] for n in ("run", "whole")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_run_that_no_plan_fits_fails_before_it_starts(
    tune: Tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FittedPlan, "cheaper", lambda self, plan: NARROW if plan != NARROW else None)
    seen = fails(monkeypatch, float("inf"))
    with pytest.raises(TrainingError, match="does not fit into memory,"):
        tune(tmp_path / "run", **SHORT)
    assert seen == [4, 1]
    assert contents(tmp_path / "run").keys() <= {"metrics.jsonl"}


def test_a_resumed_run_has_a_dry_run_too(tune: Tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tune(tmp_path / "run", **SHORT, stop_after=2)
    done = record_dry_runs(monkeypatch)
    tune(tmp_path / "run", **SHORT, resume=True)
    assert done == [2]  # with the progress of the checkpoint: the saved state is that of a resumed run


def test_without_held_out_text_there_is_no_evaluation(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "score", pytest.fail)
    with Report(console=False) as report:
        dry_run(prepare(settings(tmp_path / "run", test_data=[], test_fraction=0.0), report))


@pytest.mark.parametrize("tiled", [False, True])
def test_evaluations_read_the_head_as_the_plan_says(
    prepared_run: Run, monkeypatch: pytest.MonkeyPatch, tiled: bool
) -> None:
    """In tiles a whole dequantized head has no place: an evaluation with one ran out of memory under a tight limit."""
    prepared_run.micro_step.plan = replace(prepared_run.micro_step.plan, tiled_head=tiled)
    given = []
    label_losses = metrics.label_losses

    def seen(*values: Any, tiled_head: bool, **options: Any) -> Any:
        given.append(tiled_head)
        return label_losses(*values, tiled_head=tiled_head, **options)

    monkeypatch.setattr(metrics, "label_losses", seen)
    dry_run(prepared_run)
    measure._score(prepared_run, prepared_run.model, "Scoring")
    assert given == [tiled] * 2
