"""A run on data sets of the hub: the commit is in its settings and its ledger, and resuming reads that commit."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import yaml
from tests.store.dataset_hub import used_hub

import octavo as api
from octavo.commands.data import read_documents
from octavo.config import TextOptions
from octavo.errors import DataError, OctavoError

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub's call of httpx


def rows(first: str) -> bytes:
    texts = [f"{first} {n} of the tide over sand and low grey stones" for n in range(12)]
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def test_settings_and_ledger_have_the_commit_and_resuming_reads_it(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    files = {"train.jsonl": rows("one"), "test.jsonl": rows("two")}
    with used_hub(monkeypatch, tmp_path / "cache") as hub:
        commit = hub.put("me/poems", files)
        api.finetune(
            model=tiny_llama, data="hf:me/poems", test_data="hf:me/poems:test", out=out, dtype="float32", seq_len=8,
            steps=2, stop_after=1, checkpoint_every=1, rank=2, sample_tokens=1, quiet=True,
        )  # fmt: skip
        settings = yaml.safe_load((out / "config.yaml").read_text())
        assert settings["data"] == [f"hf:me/poems@{commit}"]
        assert settings["test_data"] == [f"hf:me/poems@{commit}:test"]
        ledgers = json.loads((out / "ledger.json").read_text())
        for side, name in (("train", "train.jsonl"), ("test", "test.jsonl")):
            (file,) = ledgers[side]["files"]
            assert file["source"] == f"hf:me/poems/{name}"
            assert file["sha256"] == hashlib.sha256(files[name]).hexdigest()
            assert ledgers[side]["revisions"] == {"hf:me/poems": commit}
        hub.put("me/poems", {"train.jsonl": rows("changed"), "test.jsonl": rows("two")})
        assert api.finetune(resume=True, out=out, quiet=True).to_dict()["steps"] == 2
        with pytest.raises(OctavoError, match="data"):  # the newest commit has other data
            api.finetune(resume=True, out=out, data="hf:me/poems", steps=3, quiet=True)


def test_errors_and_counts_name_the_file_of_the_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with used_hub(monkeypatch, tmp_path / "cache") as hub:
        commit = hub.put("me/poems", {"data/train.jsonl": b'{"text": "good"}\nbad\n'})
        with pytest.raises(DataError) as caught:
            read_documents(["hf:me/poems"], TextOptions())
        assert caught.value.message.startswith("hf:me/poems/data/train.jsonl:2: ")
        assert str(tmp_path) not in str(caught.value)
        reading = read_documents(["hf:me/poems"], TextOptions(skip_bad=True))
        assert [document.source for document in reading.documents] == ["hf:me/poems/data/train.jsonl"]
        assert [bad.source for bad in reading.skipped] == ["hf:me/poems/data/train.jsonl"]
        assert reading.revisions == {"hf:me/poems": commit}
