"""What `--model` may name, and what is said of everything else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from octavo.errors import ModelError, UsageError
from octavo.store import opening
from octavo.store.opening import HUB_PATTERNS, open_source
from octavo.store.sources import FolderSource


def test_a_folder_is_opened_without_reading_its_weights(own_folder: Path) -> None:
    (own_folder / "model.safetensors").write_bytes(b"")
    source = open_source(str(own_folder))
    assert source.config["architectures"] == ["LlamaForCausalLM"]


def test_home_is_understood(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(own_folder.parent))
    assert open_source(f"~/{own_folder.name}").names()


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        open_source(str(tmp_path))


@pytest.mark.parametrize(
    "model", ["no-such-model", "./no/such", "/no/such", "a/b/c", "~/no-such", "~nobody/x", "no.gguf"]
)
def test_a_name_that_names_nothing_is_a_usage_error(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UsageError, match="There is no"):
        open_source(model)


def test_a_file_that_is_no_model_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("text")
    with pytest.raises(UsageError, match="neither"):
        open_source(str(tmp_path / "notes.txt"))


@pytest.mark.parametrize("model", ["octavo-tests/no-such-model", "not a/valid id"])
def test_a_hub_id_that_cannot_be_fetched_is_named(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=model) as caught:
        open_source(model)
    assert "HF_TOKEN" in caught.value.hint


@pytest.mark.parametrize("allowed", [False, True])
def test_a_hub_id_is_fetched_with_its_revision_and_pickles_only_if_allowed(
    allowed: bool, own_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, object] = {}

    def download(repo: str, **options: object) -> str:
        asked.update(options, repo=repo)
        return str(own_folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    source = open_source("owner/name", revision="abc", allow_pickle=allowed)
    assert isinstance(source, FolderSource)
    assert source.allow_pickle is allowed
    patterns = [*HUB_PATTERNS, "*.bin"] if allowed else HUB_PATTERNS
    assert asked == {"repo": "owner/name", "revision": "abc", "allow_patterns": patterns}


def test_without_weights_the_config_alone_is_fetched(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def download(repo: str, file: str, *, revision: str | None) -> str:
        asked.extend((repo, file, revision))
        return str(own_folder / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("weights"))
    source = open_source("owner/name", revision="abc", weights=False)
    assert asked == ["owner/name", "config.json", "abc"]
    assert source.config == json.loads((own_folder / "config.json").read_text())
    assert not source.names()
    assert not source.files
    for lacking in (lambda: source.tensor("x"), source.tokenizer):
        with pytest.raises(ModelError, match="not fetched"):
            lacking()
    # What lies here is opened whole.
    assert open_source(str(own_folder), weights=False).names()


@pytest.mark.parametrize("model", ["octavo-tests/no-such-model", "not a/valid id"])
def test_a_config_that_cannot_be_fetched_is_named(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=model):
        open_source(model, weights=False)


def test_nothing_that_runs_is_fetched_from_the_hub() -> None:
    assert not [pattern for pattern in HUB_PATTERNS if pattern.endswith((".py", "*", ".bin", ".pt", ".pkl"))]


def test_a_folder_called_smollm2_comes_before_the_built_in_model(
    own_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "open_smollm2", lambda *, say: pytest.fail("the built-in one"))
    monkeypatch.chdir(own_folder.parent)
    own_folder.rename("smollm2")
    assert open_source("smollm2").names()
