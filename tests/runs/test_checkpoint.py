"""A checkpoint is read back as it was saved, or the earlier one is."""

from __future__ import annotations

import json
import os
import random
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from octavo.atomic import sweep
from octavo.errors import CheckpointError
from octavo.layers.lora import LoraSpec
from octavo.runs import checkpoint, checkpoint_folder
from octavo.runs.checkpoint import Contents
from octavo.store import files, peft
from octavo.store.peft import Adapter


def tensors_of(step: int) -> dict[str, dict[str, torch.Tensor]]:
    """Tensors that a run may have: overlapping views of one flat buffer, rare types, no dimensions, no elements."""
    flat = torch.arange(12, dtype=torch.float32) + step
    views = {"a": flat[:8].view(2, 4), "b": flat[4:], "b.T": flat.view(3, 4).t()}
    rare = {
        "bf16": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
        "codes": torch.arange(256, dtype=torch.uint8),
        "count": torch.tensor(step, dtype=torch.int64),
        "none": torch.empty(0, 3),
        "flags": torch.tensor([True, False]),
    }
    return {"views": views, "optimizer": rare}


def adapter_of(step: int) -> Callable[[Path], None]:
    """An adapter of one linear with values that tell the step."""
    pair = torch.full((1, 3), float(step)), torch.full((4, 1), float(step)), 2.0
    adapter = Adapter(LoraSpec(1, 2.0), {"model.layers.0.q_proj": pair}, {}, {"step": step})
    return partial(
        peft.fill, adapter=adapter, modules=["model.layers.0.q_proj"], biases=False, base="base", readme="#\n"
    )


def save(folder: Path, step: int, **options: Any) -> Path:
    contents = Contents(tensors_of(step), {"step": step}, {"adapter": adapter_of(step)})
    return checkpoint.save(folder, step, contents, **options)


def newest(folder: Path) -> checkpoint.Checkpoint:
    """The newest checkpoint, which is asked for without a warning and must be right in itself."""
    found = checkpoint.newest(folder, warn=pytest.fail)
    assert found is not None
    assert found.state == {"step": found.step}
    assert int(found.tensors["optimizer"]["count"]) == found.step
    assert found.adapter().lora["model.layers.0.q_proj"][0].eq(found.step).all()
    return found


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in folder.glob("step-*"))


def test_tensors_and_state_round_trip(tmp_path: Path) -> None:
    generator = random.Random(5)
    state = {"random": generator.getstate(), "huge": 2**200, "nested": {"é": [1.5, None, True, 1e-300]}}
    path = checkpoint.save(tmp_path, 40, Contents(tensors_of(40), state))
    assert path == tmp_path / "step-00000040"
    assert (tmp_path / "latest").read_text() == "step-00000040\n"
    found = checkpoint.newest(tmp_path, warn=pytest.fail)
    assert found is not None
    assert (found.step, found.path) == (40, path)
    for stem, group in tensors_of(40).items():
        assert found.tensors[stem].keys() == group.keys()
        for name, tensor in group.items():
            assert found.tensors[stem][name].dtype == tensor.dtype
            assert torch.equal(found.tensors[stem][name], tensor), name
    version, internal, gauss = found.state.pop("random")
    again = random.Random()
    again.setstate((version, tuple(internal), gauss))
    assert [again.random() for _ in range(9)] == [generator.random() for _ in range(9)]
    assert found.state == {"huge": 2**200, "nested": state["nested"]}


def test_an_empty_or_missing_folder_has_no_checkpoint(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path, warn=pytest.fail) is None
    assert checkpoint.newest(tmp_path / "none", warn=pytest.fail) is None


def test_files_have_the_modes_of_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        path = save(tmp_path, 1)
    finally:
        os.umask(before)
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.rglob("*") if file.is_file()}
    assert set(modes.values()) == {0o640}, modes


SAVED = [
    "adapter/README.md",
    "adapter/adapter_config.json",
    "adapter/adapter_model.safetensors",
    "adapter/octavo.json",
    "optimizer.safetensors",
    "state.json",
    "views.safetensors",
]


def test_the_manifest_lists_every_file_at_any_depth(tmp_path: Path) -> None:
    path = save(tmp_path, 10)
    manifest = json.loads((path / "manifest.json").read_text())
    assert (manifest["format"], manifest["step"], list(manifest["files"])) == (2, 10, SAVED)
    for name, entry in manifest["files"].items():
        assert entry == {"size_bytes": (path / name).stat().st_size, "sha256": files.sha256_of(path / name)}


def test_an_adapter_of_a_checkpoint_is_a_folder_of_peft(tmp_path: Path) -> None:
    contents = Contents({}, {}, {"adapter": adapter_of(3), "best": adapter_of(2)})
    checkpoint.save(tmp_path, 3, contents)
    found = checkpoint.newest(tmp_path, warn=pytest.fail)
    assert found is not None
    for name, step in (("adapter", 3), ("best", 2)):
        assert found.adapter(name).lora["model.layers.0.q_proj"][1].eq(step).all()
        assert found.adapter(name).origin["step"] == step
    assert found.tensors == {}
    with pytest.raises(CheckpointError, match="There is no folder"):
        found.adapter("third")


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_flipped_bit_is_detected_and_the_earlier_checkpoint_is_loaded(tmp_path: Path, data: st.DataObject) -> None:
    folder = tmp_path / "run"
    shutil.rmtree(folder, ignore_errors=True)
    save(folder, 10)
    path = save(folder, 20)
    file = path / data.draw(st.sampled_from(SAVED))
    content = bytearray(file.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    file.write_bytes(content)
    said: list[str] = []
    found = checkpoint.newest(folder, warn=said.append)
    assert found is not None
    assert found.step == 10
    assert len(said) == 1
    assert "step-00000020" in said[0]
    assert file.name in said[0]


DAMAGE: dict[str, Callable[[Path], object]] = {
    "shorter": lambda path: os.truncate(path / "views.safetensors", 100),
    "empty": lambda path: os.truncate(path / "state.json", 0),
    "adapter shorter": lambda path: os.truncate(path / "adapter" / "adapter_model.safetensors", 50),
    "adapter gone": lambda path: shutil.rmtree(path / "adapter"),
    "adapter of another step": lambda path: replace_adapter(path),
    "file gone": lambda path: (path / "optimizer.safetensors").unlink(),
    "manifest gone": lambda path: (path / "manifest.json").unlink(),
    "manifest cut": lambda path: os.truncate(path / "manifest.json", 50),
    "manifest a list": lambda path: (path / "manifest.json").write_text("[]"),
    "manifest of nothing": lambda path: (path / "manifest.json").write_text('{"format": 2, "step": 20, "files": {}}'),
    "manifest without a version": lambda path: change_manifest(path, format=None),
    "manifest bytes": lambda path: (path / "manifest.json").write_bytes(b"\xff\x00"),
    "another's manifest": lambda path: shutil.copy(path.parent / "step-00000010/manifest.json", path),
    "another's files": lambda path: shutil.copytree(path.parent / "step-00000010", path, dirs_exist_ok=True),
    "manifest of other types": lambda path: change_entries(path, size_bytes="1", sha256=3),
    "manifest with a size of text": lambda path: change_entries(path, size_bytes="1"),
    "outside": lambda path: list_in_manifest(path, "../latest"),
    "outside from within": lambda path: list_in_manifest(path, "adapter/../../latest"),
    "absolute": lambda path: list_in_manifest(path, str(path.parent / "latest")),
}


def change_manifest(path: Path, **values: Any) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, **values}))


def change_entries(path: Path, **values: Any) -> None:
    listed = json.loads((path / "manifest.json").read_text())["files"]
    change_manifest(path, files={name: {**entry, **values} for name, entry in listed.items()})


def list_in_manifest(path: Path, name: str) -> None:
    entry = {"size_bytes": (path / name).stat().st_size, "sha256": files.sha256_of(path / name)}
    listed = json.loads((path / "manifest.json").read_text())["files"]
    change_manifest(path, files={**listed, name: entry})


def replace_adapter(path: Path) -> None:
    shutil.rmtree(path / "adapter")
    shutil.copytree(path.parent / "step-00000010" / "adapter", path / "adapter")


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_skipped_with_one_warning(kind: str, tmp_path: Path) -> None:
    save(tmp_path, 10)
    path = save(tmp_path, 20)
    assert checkpoint_folder.verify(path) == []
    DAMAGE[kind](path)
    assert checkpoint_folder.verify(path)
    said: list[str] = []
    found = checkpoint.newest(tmp_path, warn=said.append)
    assert found is not None
    assert (found.step, len(said)) == (10, 1)


@pytest.mark.parametrize("version", [1, 3])
def test_another_format_version_is_an_error_that_names_both(version: int, tmp_path: Path) -> None:
    save(tmp_path, 10)
    change_manifest(save(tmp_path, 20), format=version)
    with pytest.raises(CheckpointError, match=rf"step-00000020 has the format version {version}; .* reads version 2"):
        checkpoint.newest(tmp_path, warn=pytest.fail)


def test_a_tensor_file_that_is_none_is_an_error_that_names_it(tmp_path: Path) -> None:
    """The manifest lists it as it is."""
    path = save(tmp_path, 10)
    (path / "optimizer.safetensors").write_bytes((path / "optimizer.safetensors").read_bytes()[:-1])
    list_in_manifest(path, "optimizer.safetensors")
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors is not a safetensors file") as caught:
        checkpoint.newest(tmp_path, warn=pytest.fail)
    assert "Delete its folder" in caught.value.hint


def test_damaged_checkpoints_without_a_valid_one_are_an_error(tmp_path: Path) -> None:
    (save(tmp_path, 10) / "state.json").unlink()
    with pytest.raises(CheckpointError, match="none of its 1 checkpoints"):
        checkpoint.newest(tmp_path, warn=lambda _: None)


@pytest.mark.parametrize("pointer", [b"step-00000010\n", b"step-99999999\n", b"\xff\x00garbage", b"", None])
def test_a_stale_or_broken_latest_file_is_ignored(pointer: bytes | None, tmp_path: Path) -> None:
    save(tmp_path, 10)
    save(tmp_path, 20)
    (tmp_path / "latest").unlink() if pointer is None else (tmp_path / "latest").write_bytes(pointer)
    assert newest(tmp_path).step == 20
    save(tmp_path, 30)
    assert (tmp_path / "latest").read_text() == "step-00000030\n"


def test_the_newest_and_the_protected_steps_are_kept(tmp_path: Path) -> None:
    for step in range(1, 7):
        save(tmp_path, step, keep=2, protect={2})
    assert steps(tmp_path) == [2, 5, 6]
    save(tmp_path, 6, keep=1)
    assert steps(tmp_path) == [6]
    assert newest(tmp_path).step == 6


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 3, Contents({"old": {"x": torch.zeros(3)}}, {"step": -1}))
    save(tmp_path, 3)
    assert newest(tmp_path).tensors.keys() == {"views", "optimizer"}
    assert steps(tmp_path) == [3]


def test_a_write_that_reads_back_differently_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    honest = files.sha256_of
    digests = iter(["0" * 64])
    monkeypatch.setattr(checkpoint_folder, "sha256_of", lambda path: next(digests, None) or honest(path))
    with pytest.raises(CheckpointError, match="reading the checkpoint back"):
        save(tmp_path, 2, keep=1)
    assert newest(tmp_path).step == 1


def test_sweep_removes_files_of_dead_processes_only(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        dead = process.pid
    alive = os.getppid()
    save(tmp_path, 5)
    ended, running = (f".tmp-step-00000001-{dead}", f".old-step-00000005-{dead}"), f".tmp-step-00000002-{alive}"
    for name in (*ended, running, ".tmp-notes"):
        (tmp_path / name).mkdir()
    (tmp_path / f".latest.{dead}").write_text("step")
    removed = {path.name for path in sweep(tmp_path)}
    assert removed == {*ended, f".latest.{dead}"}
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"step-00000005", "latest", running, ".tmp-notes"}


IDENTITY = {"model": "abc", "rank": 8, "targets": ["q_proj", "v_proj"], "data": "d1"}


def test_the_error_of_another_run_lists_each_difference(tmp_path: Path) -> None:
    checkpoint.check_identity(IDENTITY, {**IDENTITY, "targets": ("q_proj", "v_proj")}, force=False, warn=pytest.fail)
    other = {**IDENTITY, "rank": 16, "seed": 1}
    with pytest.raises(CheckpointError) as caught:
        checkpoint.check_identity(IDENTITY, other, force=False, warn=pytest.fail)
    message = str(caught.value)
    assert "rank: 8 in the checkpoint, 16 now" in message
    assert "seed: None in the checkpoint, 1 now" in message
    assert "--force" in message
    assert "targets" not in message
    said: list[str] = []
    checkpoint.check_identity(IDENTITY, other, force=True, warn=said.append)
    assert len(said) == 1
    assert "rank" in said[0]
