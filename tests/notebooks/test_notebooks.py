"""The notebooks: their code runs from top to bottom, with a tiny model, and in a kernel with SmolLM2 (exhaustive)."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from tests.conftest import Seed

import octavo

FOLDER = Path(__file__).parents[2] / "notebooks"
NAMES = ("finetune", "generate-and-chat", "perplexity-check", "old-checkpoints")
SECONDS = 3_600  # of a cell in a kernel: a limit for one that hangs, also on a slow machine


def notebook(name: str) -> Any:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)  # type: ignore[no-untyped-call]


def tagged(cells: list[Any], tag: str) -> list[Any]:
    return [cell for cell in cells if tag in cell.metadata.get("tags", [])]


def with_settings(name: str, **settings: object) -> list[str]:
    """The code of a notebook's cells without the installation, its settings followed by other ones."""
    code = [cell for cell in notebook(name).cells if cell.cell_type == "code"]
    (parameters,), (install,) = tagged(code, "parameters"), tagged(code, "install")
    assigned = re.findall(r"^([A-Z_, ]+) =", parameters.source, re.MULTILINE)
    assert settings.keys() <= {key for names in assigned for key in names.split(", ")}
    parameters.source += "\n" + "\n".join(f"{key} = {value!r}" for key, value in settings.items())
    return [cell.source for cell in code if cell is not install]


def executed(name: str, **settings: object) -> dict[str, Any]:
    """The names of a notebook after its cells ran in this process."""
    names: dict[str, Any] = {"__name__": "notebook"}
    for number, source in enumerate(with_settings(name, **settings), 1):
        exec(compile(source, f"{name}.ipynb, cell {number}", "exec"), names)  # noqa: S102
    return names


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def old_checkpoint(seed: Seed, folder: Path) -> str:
    """A checkpoint as the article's script saved it: 8-bit weights and adapters in one pickle."""
    shutil.copytree(seed.folder, folder / "old")
    return "old"


def test_the_folder_has_these_notebooks() -> None:
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_stripped_and_short(name: str) -> None:
    found = notebook(name)
    nbformat.validate(found)
    code = [cell for cell in found.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    assert found.metadata.keys() == {"kernelspec", "language_info"}
    assert len(found.cells) <= 14
    assert not re.search(r"[\"'(]/\w+/", json.dumps(found))  # an absolute path
    assert "%pip install --quiet octavo" in tagged(code, "install")[0].source


def test_finetune_trains_and_goes_on_when_it_is_run_again(
    tiny_llama: Path, plays: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings: dict[str, Any] = {
        "GPU": False, "MODEL": str(tiny_llama), "REVISION": None, "ALLOW_PICKLE": False, "SEQ_LEN": 64, "STEPS": 6,
        "TEXTS": str(plays / "train"), "HELD_OUT": str(plays / "test"),
    }  # fmt: skip
    names = executed("finetune", **settings)
    run = names["run"]
    assert (run.steps, run.adapter) == (6, Path("runs/mine/adapter"))
    assert run.rows[-1]["perplexity"] < run.rows[0]["perplexity"]
    shown = capsys.readouterr().out
    assert f"perplexity of the held-out text {run.metrics[-1]['held_out_perplexity']:.2f}" in shown
    again = executed("finetune", **settings)["run"]
    assert [event for event in again.events if event.kind == "step"] == [
        event for event in run.events if event.kind == "step"
    ]


def test_generate_and_chat(tiny_llama: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = executed("generate-and-chat", MODEL=str(tiny_llama), NEW_TOKENS=4)
    answer = octavo.load(tiny_llama, quiet=True).generate("To be, or not", max_new_tokens=4, temperature=0)
    assert repr(answer["text"]) in capsys.readouterr().out
    assert [message["role"] for message in names["messages"]] == ["user", "assistant", "user"]


def test_perplexity_check(tiny_llama: Path, folder: Path, adapter_folder: Path, plays: Path) -> None:
    text = next((plays / "test").iterdir())
    settings: dict[str, Any] = {"MODEL": str(tiny_llama), "RUN": str(adapter_folder), "TEXT": str(text), "SEQ_LEN": 64}
    names = executed("perplexity-check", **settings)
    assert [row["scheme"] for row in names["table"]["rows"]] == ["none", "int8", "nf4"]
    assert [row["name"] for row in names["compared"]["rows"]][-1] == "tuned"


def test_old_checkpoints(old_checkpoint: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole file and its two halves give one answer."""
    names = executed("old-checkpoints", FOLDER=old_checkpoint, SPLIT="split", PROMPT="the king")
    whole, halves = (names[name].generate("the king")["text"] for name in ("model", "tuned"))
    assert whole == halves
    assert (folder / "split" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_in_a_kernel_with_the_small_real_model(name: str, old_checkpoint: str, folder: Path) -> None:
    plays = Path(octavo.__file__).parent / "shakespeare"
    play = next((plays / "test").iterdir())
    (folder / "test.txt").write_bytes(play.read_bytes()[:4_000])  # all of it takes minutes
    settings: dict[str, dict[str, Any]] = {
        # As on a machine without a GPU, with fewer steps.
        "finetune": {
            "GPU": False, "MODEL": "smollm2", "REVISION": None, "ALLOW_PICKLE": False, "TEXTS": str(plays / "train"),
            "HELD_OUT": "test.txt", "SEQ_LEN": 128, "BATCH_SIZE": 4, "STEPS": 6, "NEW_TOKENS": 8,
        },
        "generate-and-chat": {"NEW_TOKENS": 8},
        "perplexity-check": {"TEXT": "test.txt"},
        "old-checkpoints": {"FOLDER": old_checkpoint, "SPLIT": "split", "PROMPT": "the king"},
    }  # fmt: skip
    found = notebook(name)
    found.cells = [
        nbformat.v4.new_code_cell(source)  # type: ignore[no-untyped-call]
        for source in with_settings(name, **settings[name])
    ]
    NotebookClient(found, timeout=SECONDS, resources={"metadata": {"path": str(folder)}}).execute()
    shown = "".join(output.get("text", "") for cell in found.cells for output in cell.outputs)
    assert shown.strip()
    if name == "finetune":
        outputs = [output for cell in found.cells for output in cell.outputs]
        assert any("text/html" in output.get("data", {}) for output in outputs)  # the report
        assert "step     6: perplexity of the held-out text" in shown
        assert (folder / "runs/mine/adapter/adapter_model.safetensors").is_file()
