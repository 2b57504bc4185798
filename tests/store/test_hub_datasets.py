"""Data sets of the hub, downloaded by the real huggingface_hub from a stand-in."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.store.dataset_hub import Hub, used_hub

from octavo.errors import OctavoError, UsageError
from octavo.reporting import Report
from octavo.store.hub_datasets import DatasetName, cached_file, local_files, pinned

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub's call of httpx


def rows(*texts: str) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


FILES = {"README.md": b"# Poems\n", "train.jsonl": rows("one"), "test.jsonl": rows("two"), "image.png": b"\x89PNG"}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with used_hub(monkeypatch, tmp_path / "cache") as hub:
        yield hub


@pytest.mark.parametrize(
    "text",
    ["hf:me/poems", "hf:me/poems:test", "hf:me/poems/en", "hf:me/poems/en@v1.0:test", "hf:me/poems@refs/pr/1"],
)
def test_names_are_read_and_written(text: str) -> None:
    assert str(DatasetName.parse(text)) == text


@pytest.mark.parametrize(
    "text", ["hf:poems", "hf:", "hf:/a/b", "hf:../b", "hf:a/b/c/d", "hf:a/b@", "hf:a/b:", "hf:a b/c"]
)
def test_other_names_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="names no data set"):
        DatasetName.parse(text)


def test_only_the_files_of_the_split_are_downloaded(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    commit = hub.put("me/poems", FILES)
    with Report(results=True) as report:
        local = local_files(["hf:me/poems:test", "other.txt"], report)
    assert Path(local.paths[0]).read_bytes() == FILES["test.jsonl"]
    assert local.paths[1] == "other.txt"
    assert list(local.names.values()) == ["hf:me/poems/test.jsonl"]
    assert local.revisions == {"hf:me/poems": commit}
    assert hub.sent == ["README.md", "test.jsonl"]
    assert capsys.readouterr().err == f"hf:me/poems: commit {commit[:12]}, split test, 1 file, 0.0 MB.\n"
    assert cached_file("hf:me/poems/test.jsonl", local.revisions) == Path(local.paths[0])
    assert cached_file("hf:me/poems/train.jsonl", local.revisions) is None


def test_a_pinned_name_names_the_same_data_later(hub: Hub) -> None:
    commit = hub.put("me/poems", FILES)
    hub.put("me/poems", {"train.jsonl": rows("a branch")}, "dev")
    (name,) = pinned(["hf:me/poems"])
    assert name == f"hf:me/poems@{commit}"
    assert pinned(["a.txt", name]) == ["a.txt", name]
    hub.put("me/poems", {"train.jsonl": rows("changed")})
    assert Path(local_files([name]).paths[0]).read_bytes() == FILES["train.jsonl"]
    assert b"changed" in Path(local_files(["hf:me/poems"]).paths[0]).read_bytes()
    assert b"branch" in Path(local_files(["hf:me/poems@dev"]).paths[0]).read_bytes()
    with pytest.raises(UsageError, match="two revisions"):
        local_files(["hf:me/poems", name])


def test_what_was_downloaded_is_read_without_a_network(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    hub.put("me/poems", FILES)
    online = local_files(["hf:me/poems"])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    count = hub.requests
    assert local_files(["hf:me/poems"]) == online
    assert local_files(pinned(["hf:me/poems"])) == online
    assert hub.requests == count
    with pytest.raises(OctavoError, match="could not be fetched") as caught:
        local_files(["hf:me/poems:test"])  # another split
    assert "HF_HUB_OFFLINE" in caught.value.hint
    with pytest.raises(OctavoError, match="could not be fetched"):
        local_files(["hf:me/other"])


def test_a_hub_that_cannot_be_reached_gives_a_warning_with_the_commit_of_the_cache(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from huggingface_hub import constants

    commit = hub.put("me/poems", FILES)
    online = local_files(["hf:me/poems"])
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with Report() as report:
        assert local_files(["hf:me/poems"], report) == online
        warning, _ = capsys.readouterr().err.splitlines()
        assert local_files([f"hf:me/poems@{commit}"], report) == online
    assert warning.startswith("warning: hf:me/poems: the hub could not be reached (ConnectError)")
    assert commit[:12] in warning
    assert "warning" not in capsys.readouterr().err


def test_errors_of_the_hub_say_what_to_do(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    with pytest.raises(UsageError, match="no data set hf:me/poems on the hub") as caught:
        local_files(["hf:me/poems"])
    assert "hf auth login" in caught.value.hint
    hub.put("me/poems", FILES)
    with pytest.raises(UsageError, match="no revision 'v9'"):
        local_files(["hf:me/poems@v9"])
    for status, code, why in ((403, "GatedRepo", "is gated"), (401, "GatedRepo", "is gated"), (403, "", "may not be")):
        hub.refuses = status, code
        with pytest.raises(UsageError, match=why) as caught:
            local_files(["hf:me/poems"])
        assert "hf auth login" in caught.value.hint
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(OctavoError, match="could not be fetched"):
        local_files(["hf:me/other"])


@pytest.mark.parametrize(
    "name", ["../train.jsonl", "a/../../train.jsonl", "/train.jsonl", "C:/train.jsonl", "a\\train.jsonl"]
)
def test_a_name_that_leads_out_of_the_folder_is_refused(hub: Hub, tmp_path: Path, name: str) -> None:
    hub.put("me/poems", {"README.md": b"", name: rows("bad")})
    with pytest.raises(OctavoError, match="hf:me/poems"):
        local_files(["hf:me/poems"])
    assert set(hub.sent) <= {"README.md"}
    assert not list(tmp_path.rglob("train.jsonl"))
