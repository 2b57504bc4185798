"""Local lm-eval tasks, and models for lm-eval and octavo."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests import devices
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from octavo.commands.loading import end_ids, load_model
from octavo.harness.model import OctavoLM
from octavo.infer.loaded_model import LoadedModel
from octavo.ops.quantize import scheme_named
from octavo.reporting import Report
from octavo.store.sources import FolderSource

CPU = devices.hardware(devices.CPU)
Write = Callable[..., Path]


def open_lm(folder: Path, *, batch: int = 3, report: Report | None = None) -> OctavoLM:
    """The unquantized model of a folder in float32, as lm-eval calls it."""
    source, quiet = FolderSource(folder), report or Report(console=False)
    model = load_model(source, scheme_named("none"), CPU, quiet)
    return OctavoLM(LoadedModel(model, source.tokenizer(), end_ids(source)), batch=batch, report=quiet)


@pytest.fixture
def write_task(tmp_path: Path) -> Write:
    """Writes the YAML of a task and its documents; returns the folder."""

    def write(name: str, documents: list[dict[str, Any]], **config: Any) -> Path:
        folder = tmp_path / "tasks"
        folder.mkdir(exist_ok=True)
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(document) + "\n" for document in documents))
        files = {"data_files": {"test": str(data)}, "cache_dir": str(tmp_path / "cache")}
        task = {"task": name, "dataset_path": "json", "dataset_kwargs": files, "test_split": "test", **config}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))
        return folder

    return write


@pytest.fixture(scope="session")
def beginning(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with a tokenizer that puts a BOS token before every text, as Llama tokenizers do."""
    folder = Path(shutil.copytree(tiny_llama, tmp_path_factory.mktemp("begin") / "llama"))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, bos_token="<|im_start|>")
    begin = TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    tokenizer.backend_tokenizer.post_processor = begin
    tokenizer.save_pretrained(folder)
    return folder
