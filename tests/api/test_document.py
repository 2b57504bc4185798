"""docs/python-api.md, executed with a tiny model in place of SmolLM2."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

DOCUMENT = Path(__file__).parents[2] / "docs" / "python-api.md"


def test_the_code_of_the_document_runs(
    tiny_llama: Path, plays: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(plays / "train", tmp_path / "my-texts")
    shutil.copy(next((plays / "test").iterdir()), tmp_path / "held-out.txt")
    blocks = re.findall(r"^```python\n(.*?)^```$", DOCUMENT.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    code = "".join(blocks)
    assert code.count('"smollm2"') == 7
    names: dict[str, Any] = {"__name__": "document"}
    exec(compile(code.replace('"smollm2"', repr(str(tiny_llama))), str(DOCUMENT), "exec"), names)  # noqa: S102
    run = names["run"]
    assert (run.steps, run.adapter) == (10, Path("runs", "mine", "adapter"))
    assert names["comparison"]["settings"] == {"lr": [0.002, 0.001]}
    assert names["comparison"]["differences"][0]["comparable"] == "loss"
    assert (tmp_path / "compare.html").is_file()
    base, tuned = (row["perplexity"] for row in run.rows[-2:])
    assert tuned < base
    assert len(names["answer"]["token_ids"]) <= 20
    assert names["logits"].shape == (*names["ids"].shape, 300)
    assert torch.isfinite(names["logits"]).all()
    assert names["best"]["scheme"] in ("none", "int8", "nf4")
    assert (tmp_path / "smollm2-int8" / "model.safetensors").is_file()
    assert (names["single"]["base_scheme"], names["single"]["error"]) == ("none", None)
    assert (tmp_path / "merged" / "README.md").is_file()
    assert 0 < names["small"]["error"] < 0.02
    assert names["estimate"]["plans"][0]["fits"]
    printed = capsys.readouterr().out.replace("\n", " ")
    expected = re.findall(r"print\(error\)  # (.*)", code)
    assert len(expected) == 2
    assert all(text in printed for text in expected)
