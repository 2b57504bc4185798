"""commands/finetune/state.py: the progress of a run is saved in a checkpoint and restored."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from octavo.adapters import copied
from octavo.commands.finetune.prepare import prepare, total_steps
from octavo.commands.finetune.state import (
    Run,
    RunState,
    adapter_files,
    contents_of,
    resume,
    save_checkpoint,
    trained_adapter,
)
from octavo.config import Config, TrainOptions
from octavo.data.loader import Position
from octavo.data.packing import most_documents
from octavo.errors import CheckpointError
from octavo.reporting import Report
from octavo.runs import checkpoint
from octavo.runs.events import ScoreRow
from octavo.store.files import sha256_of

Settings = Callable[..., Config]


@pytest.fixture
def begin(settings: Settings, tmp_path: Path) -> Iterator[Callable[[], Run]]:
    """Prepares a run, always the same."""
    with Report(console=False) as report:
        yield lambda: prepare(settings(tmp_path / "run", keep="last"), report)


def filled(run: Run, *, step: int) -> Run:
    """Gives `run` the state of a trained run, with values that differ from the initial ones."""
    generator = torch.Generator().manual_seed(step)
    for parameter in run.trainer.parameters.values():
        parameter.data.normal_(generator=generator)
    run.state.done, run.state.position = step, Position(2, 5)
    run.state.base_rows = [ScoreRow("base", "int8", perplexity=1 / 3, also_in_training=0.25)]
    run.state.base_losses = {"nats": torch.rand(12, generator=generator).double(), "tokens": torch.arange(12)}
    run.state.reference_logits = torch.rand(4, 300, generator=generator)
    run.trainer.scaler.load_state({"scale": 2.0**step, "good_steps": step})
    return run


def run_with_best(config: Config, report: Report) -> Run:
    """A prepared run after two steps, of which the first had the best held-out loss."""
    run = prepare(config, report)
    run.state.done = 1
    run.state.best, run.state.best_adapter = {"step": 1, "loss": 2.0}, copied(trained_adapter(run))
    run.state.done, run.state.reference_logits = 2, torch.ones(3, 4)
    return run


def test_the_plan_of_a_run_counts_the_documents_of_its_rows(settings: Settings, tmp_path: Path) -> None:
    with Report(console=False) as report:
        run = prepare(settings(tmp_path / "run"), report)
        again = prepare(settings(tmp_path / "run", resume=True), report)
    most = most_documents(run.train.rows)
    assert most > 1
    assert run.fit.planner.documents == run.micro_step.documents == most
    assert again.fit.plan == run.fit.plan


def test_the_state_is_restored_bit_for_bit(begin: Callable[[], Run]) -> None:
    saved = filled(begin(), step=7)
    save_checkpoint(saved)
    fresh = begin()
    assert resume(fresh)
    assert (fresh.state.done, fresh.state.position) == (7, Position(2, 5))
    assert fresh.state.base_rows == saved.state.base_rows
    assert saved.state.base_losses is not None
    assert fresh.state.base_losses is not None
    for name, tensor in saved.state.base_losses.items():
        assert torch.equal(fresh.state.base_losses[name], tensor), name
    assert fresh.trainer.scaler.state() == {"scale": 2.0**7, "good_steps": 7}
    assert torch.equal(torch.as_tensor(fresh.state.reference_logits), torch.as_tensor(saved.state.reference_logits))
    for name, parameter in saved.trainer.parameters.items():
        assert torch.equal(fresh.trainer.parameters[name], parameter), name


def test_the_model_uses_the_restored_parameters(begin: Callable[[], Run]) -> None:
    """The parameters are views of the optimizer's buffers and parameters of the model: all three share memory."""
    saved = filled(begin(), step=7)
    save_checkpoint(saved)
    fresh = begin()
    ids = torch.tensor([[2, 40, 41, 42]])
    with torch.no_grad():
        before = fresh.model(ids)
        resume(fresh)
        assert torch.equal(fresh.model(ids), saved.model(ids))
    assert not torch.equal(fresh.model(ids), before)
    buffers = {group.values.untyped_storage().data_ptr() for group in fresh.trainer.optimizer.groups}
    assert {p.untyped_storage().data_ptr() for p in fresh.trainer.parameters.values()} == buffers


def test_the_seed_determines_the_initial_adapters(settings: Settings, tmp_path: Path) -> None:
    with Report(console=False) as report:
        runs = [prepare(settings(tmp_path / "run", seed=seed), report) for seed in (0, 0, 1)]
    name = next(name for name in runs[0].trainer.parameters if name.endswith("lora_A"))
    first, same, other = (run.trainer.parameters[name] for run in runs)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_an_empty_folder_has_nothing_to_resume(begin: Callable[[], Run]) -> None:
    run = begin()
    assert not resume(run)
    assert run.state == RunState()


def test_the_identity_depends_on_the_data_and_not_on_their_path(
    settings: Settings, plays: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in (plays / "train").iterdir():
        (moved / file.name).write_bytes(file.read_bytes())
    with Report(console=False) as report:
        save_checkpoint(filled(prepare(settings(tmp_path / "run"), report), step=1))
        assert resume(prepare(settings(tmp_path / "run", data=[str(moved)]), report))
        (moved / "play0.txt").write_text((moved / "play0.txt").read_text() + "the sea\n")
        with pytest.raises(CheckpointError, match="data: "):
            resume(prepare(settings(tmp_path / "run", data=[str(moved)]), report))


@pytest.mark.parametrize("change", ["missing", "of another shape"])
def test_the_error_for_a_tensor_that_does_not_fit_names_it(
    change: str, begin: Callable[[], Run], tmp_path: Path
) -> None:
    """A complete checkpoint by its manifest, but of a version with other tensors."""
    run = filled(begin(), step=2)
    adapter = copied(trained_adapter(run))
    name, (a, b, scaling) = next(iter(adapter.lora.items()))
    lora = {key: value for key, value in adapter.lora.items() if key != name}
    if change == "of another shape":
        lora[name] = (a, b[1:].clone(), scaling)
    fill = adapter_files(run, replace(adapter, lora=lora))
    contents = replace(contents_of(run), adapters={"adapter": fill})
    checkpoint.save(tmp_path / "run" / "checkpoints", 2, contents)
    tensor, shape = ("lora_A", a.shape) if change == "missing" else ("lora_B", b.shape)
    with pytest.raises(CheckpointError) as caught:
        resume(begin())
    assert f"step-00000002 does not fit. The adapter has no {name}.{tensor} of shape {tuple(shape)}" in str(
        caught.value
    )


@pytest.mark.parametrize(
    ("part", "named"),
    [
        ("optimizer", "optimizer.safetensors"),
        ("probe", "probe.safetensors"),
        ("adapter", "adapter"),
        ("best", "best"),
        ("scaler", "state.json: scaler"),
    ],
)
def test_a_checkpoint_that_lacks_a_part_is_an_error_that_names_it(
    settings: Settings, tmp_path: Path, part: str, named: str
) -> None:
    """Its manifest is in order: it lists only what is there."""
    with Report(console=False) as report:
        run = run_with_best(settings(tmp_path / "run"), report)
        whole = contents_of(run)
        lacking = checkpoint.Contents(
            {key: value for key, value in whole.tensors.items() if key != part},
            {key: value for key, value in whole.state.items() if key != part or part == "best"},
            {key: value for key, value in whole.adapters.items() if key != part},
        )
        checkpoint.save(run.folder.checkpoints, 2, lacking)
        fresh = prepare(settings(tmp_path / "run"), report)
        with pytest.raises(CheckpointError, match=rf"step-00000002 lacks {named}\.") as caught:
            resume(fresh)
        assert "Delete its folder" in caught.value.hint
        checkpoint.save(run.folder.checkpoints, 2, whole)
        assert resume(fresh)


@pytest.mark.parametrize(
    "wrong",
    [
        {"position": {}},
        {"position": []},
        {"position": {"epoch": 0, "index": "1"}},
        {"position": {"epoch": -1, "index": 0}},
        {"scaler": {}},
        {"scaler": {"scale": "1", "good_steps": 0}},
        {"best": {}},
        {"best": {"step": "2", "loss": 1.0}},
        {"best": 3},
        {"precision": []},
        {"precision": {"no layer": []}},
        {"precision": {"0.qkv": 3}},
        {"forward_only": 1},
        {"config": 3},
        {"identity": []},
        {"base_rows": {}},
        {"base_rows": [3]},
        {"base_rows": [{}]},
        {"step": 3},
        {"step": "2"},
    ],
    ids=str,
)
def test_a_state_with_another_field_than_was_saved_is_an_error_that_names_it(
    begin: Callable[[], Run], settings: Settings, tmp_path: Path, wrong: dict[str, object]
) -> None:
    run = filled(begin(), step=2)
    whole = contents_of(run)
    adapters = {**whole.adapters, "best": whole.adapters["adapter"]}
    contents = replace(whole, state={**whole.state, **wrong}, adapters=adapters)
    checkpoint.save(run.folder.checkpoints, 2, contents)
    (name,) = wrong
    with pytest.raises(CheckpointError, match=rf"state\.json is not what octavo writes: {name}") as caught:
        resume(begin())
    assert "Delete its folder" in caught.value.hint


def test_a_state_without_a_step_is_that_of_the_manifest(begin: Callable[[], Run]) -> None:
    run = filled(begin(), step=2)
    whole = contents_of(run)
    assert whole.state["step"] == 2
    state = {key: value for key, value in whole.state.items() if key != "step"}
    checkpoint.save(run.folder.checkpoints, 2, replace(whole, state=state))
    assert resume(fresh := begin())
    assert fresh.state.done == 2


def test_an_optimizer_state_without_the_number_of_steps_is_an_error_that_names_it(begin: Callable[[], Run]) -> None:
    run = filled(begin(), step=2)
    whole = contents_of(run)
    optimizer = {key: tensor for key, tensor in whole.tensors["optimizer"].items() if key != "0.step"}
    checkpoint.save(run.folder.checkpoints, 2, replace(whole, tensors={**whole.tensors, "optimizer": optimizer}))
    with pytest.raises(CheckpointError, match=r"step-00000002.optimizer\.safetensors: .* 0\.step"):
        resume(begin())


def test_a_best_adapter_without_its_step_is_an_error_that_names_the_file(settings: Settings, tmp_path: Path) -> None:
    with Report(console=False) as report:
        run = run_with_best(settings(tmp_path / "run"), report)
        whole = contents_of(run)

        def without_origin(folder: Path) -> None:
            whole.adapters["best"](folder)
            (folder / "octavo.json").unlink()

        checkpoint.save(run.folder.checkpoints, 2, replace(whole, adapters={**whole.adapters, "best": without_origin}))
        with pytest.raises(CheckpointError, match=r"best.octavo\.json: step is None"):
            resume(prepare(settings(tmp_path / "run"), report))


def test_an_option_that_the_checkpoint_does_not_name_had_its_default(
    settings: Settings, begin: Callable[[], Run], tmp_path: Path
) -> None:
    """A run of an earlier version of octavo, which did not have the option."""
    run = filled(begin(), step=1)
    contents = contents_of(run)
    identity = {name: value for name, value in contents.state["identity"].items() if name != "rslora"}
    earlier = replace(contents, state={**contents.state, "identity": identity})
    checkpoint.save(run.folder.checkpoints, 1, earlier)
    assert resume(begin())
    with Report(console=False) as report, pytest.raises(CheckpointError, match="rslora: False in the checkpoint, True"):
        resume(prepare(settings(tmp_path / "run", keep="last", rslora=True), report))


def test_only_keep_checkpoints_checkpoints_remain(settings: Settings, tmp_path: Path) -> None:
    with Report(console=False) as report:
        run = prepare(settings(tmp_path / "run", keep_checkpoints=2), report)
        for step in (1, 2, 3):
            save_checkpoint(filled(run, step=step))
    assert sorted(path.name for path in run.folder.checkpoints.glob("step-*")) == ["step-00000002", "step-00000003"]


def test_saving_the_same_state_twice_writes_the_same_bytes(begin: Callable[[], Run], tmp_path: Path) -> None:
    hashes = []
    for _ in range(2):
        save_checkpoint(filled(begin(), step=3))
        files = sorted(f for f in (tmp_path / "run" / "checkpoints" / "step-00000003").rglob("*") if f.is_file())
        hashes.append([(file.name, sha256_of(file)) for file in files])
    assert hashes[0] == hashes[1]


@pytest.mark.parametrize(
    ("options", "rows", "steps"),
    [
        ({"steps": 3, "epochs": 9.0}, 10, 3),
        ({"steps": None, "epochs": 1.0, "batch_size": 4}, 10, 3),
        ({"steps": None, "epochs": 2.0, "batch_size": 16, "micro_batch_size": 4}, 10, 2),
        ({"steps": None, "epochs": 0.01, "batch_size": 4}, 10, 1),
        ({"steps": None, "epochs": 1.0, "batch_size": 64}, 10, 1),
    ],
)
def test_a_run_has_as_many_steps_as_its_epochs_take(
    settings: Settings, options: dict[str, object], rows: int, steps: int
) -> None:
    assert total_steps(settings(Path("run"), **options)[TrainOptions], rows) == steps
