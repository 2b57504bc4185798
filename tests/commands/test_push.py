"""`octavo push`: what the hub gets, from the real huggingface_hub, and what the model card says."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.commands.hub_uploads import Hub, serving

import octavo as api
from octavo.errors import OctavoError, UsageError
from octavo.runs import events
from octavo.store import peft

Octavo = Callable[..., Any]
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub's call of httpx
NAME = "me/my-adapter"


@pytest.fixture(scope="module")
def run(tiny_llama: Path, plays: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two steps with a checkpoint of each."""
    out = tmp_path_factory.mktemp("push") / "mine"
    api.finetune(
        model=tiny_llama, data=[plays / "train"], test_data=[plays / "test"], out=out, dtype="float32", seq_len=8,
        steps=2, checkpoint_every=1,  rank=2, sample_tokens=1, keep="last", quiet=True,
    )  # fmt: skip
    return out


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    from huggingface_hub import constants

    with serving(Hub()) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # whose protocol the stand-in has not
        monkeypatch.setenv("HF_TOKEN", "hf_secret_of_mine")
        yield hub


def test_one_commit_has_an_adapter_that_reads_back_equal(run: Path, hub: Hub, tmp_path: Path) -> None:
    done = api.push(run, repository=NAME, private=True, quiet=True)
    assert hub.commits == 1
    assert hub.private == {NAME: True}
    files = hub.repositories[NAME]["main"]
    assert set(files) == {"README.md", "adapter_config.json", "adapter_model.safetensors", "octavo.json"}
    assert done["files"] == {name: len(content) for name, content in files.items()}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    got, kept = peft.tensors_of(peft.read(tmp_path)), peft.tensors_of(peft.read(run / "adapter"))
    assert got.keys() == kept.keys()
    assert all(bool((got[key] == kept[key]).all()) for key in got)
    assert hub.tokens - {""} == {"Bearer hf_secret_of_mine"}  # the upload of a large file has an address of its own
    assert not any(b"hf_secret" in content for content in files.values())
    assert not any(str(run.parents[1]).encode() in content for content in files.values())  # no folder of this machine
    api.push(run, repository=NAME, quiet=True)  # again: the repository holds an adapter


def test_the_readme_holds_verdict_hashes_and_intervals(run: Path, plays: Path) -> None:
    done = api.push(run, repository=NAME, dry_run=True, quiet=True)
    readme, opened = done["readme"], api.Run(run)
    metadata = yaml.safe_load(readme.split("---")[1])
    assert metadata["library_name"] == "peft"
    assert "license" not in metadata  # not known of this base
    assert "datasets" not in metadata
    assert "base_model" not in metadata  # it has no hub id
    for sentence in opened.verdict.sentences:
        assert sentence in readme
    row = opened.rows[0]
    assert row["interval"] is not None
    assert row["loss"] is not None
    assert f"{row['interval']['low'] * row['bits_per_byte'] / row['loss']:.4f} to" in readme
    assert "nats" not in readme
    for file in [*(plays / "train").iterdir(), *(plays / "test").iterdir()]:
        assert f"| {file.name} |" in readme
        assert hashlib.sha256(file.read_bytes()).hexdigest() in readme
    assert str(plays) not in readme
    assert (run / "adapter/README.md").read_text() == readme.replace(NAME, "THIS_FOLDER")
    unnamed = api.push(run, repository=NAME, dry_run=True, file_names=False, quiet=True)["readme"]
    assert not any(file.name in unnamed for file in (plays / "train").iterdir())
    assert hashlib.sha256(next((plays / "train").iterdir()).read_bytes()).hexdigest() in unnamed


def test_a_dry_run_asks_the_hub_for_nothing(run: Path, octavo: Octavo) -> None:
    done = octavo("push", run, NAME, "--dry-run", "--json")  # the tests have no network
    assert done.code == 0, done.err
    document = json.loads(done.out)
    assert document["commit"] is None
    assert document["readme"].startswith("---\nlibrary_name: peft")


def test_a_checkpoint_is_pushed_by_its_step_without_the_results_of_the_end(run: Path) -> None:
    readme = api.push(f"{run}@1", repository=NAME, dry_run=True, quiet=True)["readme"]
    assert "the adapter of optimizer step 1." in readme
    assert "## Held-out text" not in readme


def test_a_run_that_has_not_finished_is_refused(run: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copy / "metrics.jsonl").write_text("".join(line for line in lines if '"evaluation"' not in line))
    assert events.last(events.read(copy / "metrics.jsonl"), events.Evaluation) is None
    with pytest.raises(UsageError, match="has not finished") as caught:
        api.push(copy, repository=NAME, quiet=True)
    assert f"{copy}@2" in caught.value.hint


def test_errors_of_the_hub_say_what_to_do_and_nothing_is_uploaded(
    run: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path, status, why in (
        ("/api/repos/create", 403, "may not write"),
        ("/commit/", 403, "may not write"),
        ("/api/models/", 401, "does not accept the token"),
    ):
        hub.refuses = path, status
        with pytest.raises(OctavoError, match=why):
            api.push(run, repository=NAME, quiet=True)
    assert hub.commits == 0
    hub.refuses = None
    hub.repositories["me/model"] = {"main": {".gitattributes": b"", "model.safetensors": b"weights"}}
    with pytest.raises(UsageError, match=r"holds no adapter: model\.safetensors"):
        api.push(run, repository="me/model", quiet=True)
    assert hub.repositories["me/model"]["main"]["model.safetensors"] == b"weights"
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(UsageError, match="no token"):
        api.push(run, repository=NAME, quiet=True)


def test_without_a_network_the_error_says_so(run: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(OctavoError, match="could not be reached"):
        api.push(run, repository=NAME, quiet=True)


def test_a_branch_is_made_for_a_revision(run: Path, hub: Hub) -> None:
    api.push(run, repository=NAME, revision="two", quiet=True)
    assert "adapter_config.json" in hub.repositories[NAME]["two"]
    assert not hub.repositories[NAME]["main"]


@pytest.mark.parametrize("name", ["mine", "a/b/c", "/x/y", "me/", "me/na me"])
def test_a_name_that_is_no_repository_is_refused(run: Path, name: str) -> None:
    with pytest.raises(UsageError):
        api.push(run, repository=name, dry_run=True, quiet=True)
