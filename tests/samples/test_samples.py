"""The samples of all written formats are opened, resumed and evaluated to the numbers that were recorded.

tests/samples/make.py describes them. Each test works on a copy.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tests.samples import make
from transformers import AutoModelForCausalLM

from octavo import html_report
from octavo.adapters import apply_
from octavo.models import Decoder
from octavo.ops.quantize import scheme_named
from octavo.runs import events
from octavo.runs.adapter import adapter_folder
from octavo.store import peft
from octavo.store.sources import FolderSource
from octavo.store.weights import load

Octavo = Callable[..., Any]

EXPECTED: dict[str, Any] = json.loads((make.HERE / "expected.json").read_bytes())
# Of a loss in float32 (and so of the logarithm of a perplexity), since CPUs sum in different orders: a matmul of 64
# terms differs by 8 x 2^-24, nine in a row by 3 times that, of logits up to 12. Measured over instruction sets: 5e-7.
TOLERANCE = 2e-5
# After two optimizer steps: a step moves each of n parameters by up to the learning rate 0.01, with a relative error of
# 1e-5 the loss by 0.01 x 1e-5 x the sum of absolute gradients, at most sqrt(n) x their norm: 1e-5 a step.
TRAINED = 1e-4
LIMIT_BYTES = 1_100_000

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning"),  # peft 0.21
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
]


def files_of(folder: Path) -> dict[str, str]:
    """The SHA-256 of the files of a folder, except the metrics, to which each call appends, and the lock."""
    kept = (path for path in folder.rglob("*") if path.is_file() and path.name not in ("metrics.jsonl", ".lock"))
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in kept}


@pytest.fixture
def samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the samples, which is the working folder: all paths in them are relative to it."""
    ignored = shutil.ignore_patterns("*.py", "__pycache__")
    copy = Path(shutil.copytree(make.HERE, tmp_path / "samples", ignore=ignored))
    monkeypatch.chdir(copy)
    return copy


def test_a_stopped_run_is_resumed_to_the_recorded_losses(octavo: Octavo, samples: Path) -> None:
    before = (samples / "run" / "metrics.jsonl").read_bytes().splitlines()
    done = octavo("finetune", "--resume", "--out", "run", "--json")
    assert done.code == 0, done.err
    warnings = [line for line in done.err.splitlines() if line.startswith("warning: ")]
    assert [line for line in warnings if "The held-out text has 1 document in 9 rows" not in line] == []
    assert (done.json["steps"], done.json["best_step"]) == (make.STEPS, make.STEPS)
    found, expected = make.losses(samples / "run"), EXPECTED["losses"]
    assert [len(expected[kind]) for kind in ("step", "heldout")] == [make.STEPS, 4]
    assert found["step"][: make.STOP] == expected["step"][: make.STOP]
    assert found["step"] == pytest.approx(expected["step"], rel=0, abs=TRAINED)
    assert found["heldout"] == pytest.approx(expected["heldout"], rel=0, abs=TRAINED)
    assert math.log(make.tuned(samples / "run")) == pytest.approx(math.log(EXPECTED["tuned"]), rel=0, abs=TRAINED)
    steps = [line for line in before if json.loads(line)["event"] in ("step", "heldout", "hardware", "versions")]
    assert [line for line in (samples / "run" / "metrics.jsonl").read_bytes().splitlines() if line in steps] == steps


def test_every_event_of_the_run_is_read() -> None:
    lines = (make.HERE / "run" / "metrics.jsonl").read_bytes().splitlines()
    found = events.read(make.HERE / "run" / "metrics.jsonl")
    assert [event.kind for event in found] == [json.loads(line)["event"] for line in lines]
    last = events.last(found, events.Step)
    assert last is not None
    assert (last.step, last.loss) == (make.STOP, EXPECTED["losses"]["step"][make.STOP - 1])


def test_the_report_of_the_run_has_all_of_its_numbers(samples: Path) -> None:
    page = html_report.write(samples / "run").read_text("utf-8")
    titles = re.findall(r'(?:<h2>|<details class="folded">\n<summary>)(.*?)</', page)
    assert titles == ["Training", "Samples", "Go on", "Token ledger", "Settings", "Hardware", "Versions"]
    ledger = json.loads((samples / "run" / "ledger.json").read_bytes())
    counts = ("documents", "tokens", "trained", "masked", "left_out", "padding")
    for side in ("train", "test"):
        row = "".join(f'<td class="number">{ledger[side][count]:,}</td>' for count in counts)
        assert row in page
    assert f"{make.STOP} steps" in page


@pytest.mark.parametrize("key", make.EVALUATED)
def test_each_is_evaluated_to_the_recorded_perplexity(key: str, octavo: Octavo, samples: Path) -> None:
    options = {**make.EVALUATION, **make.EVALUATED[key]}
    named = {f"--{name.replace('_', '-')}": value for name, value in options.items() if name != "data"}
    flags = [part for flag in named.items() for part in flag]
    done = octavo("evaluate", "--no-base", "--json", *flags, *options["data"])
    assert done.code == 0, done.err
    assert "warning" not in done.err
    found, expected = done.json["rows"][-1]["perplexity"], EXPECTED["perplexity"][key]
    assert math.log(found) == pytest.approx(math.log(expected), rel=0, abs=TOLERANCE)


def test_the_recorded_perplexities_differ_by_more_than_the_tolerance() -> None:
    """Otherwise a wrong scheme, step or adapter would not show. Equal ones are the same weights by two paths."""
    logs = {key: math.log(value) for key, value in EXPECTED["perplexity"].items()}
    same = {frozenset(("run", "best")), frozenset(("run@5", "int8 run@5"))}
    same |= {frozenset(("nf4", "nf4-double"))}  # nearly the same weights; their quantized values differ
    for one in logs:
        for other in logs:
            if one != other and frozenset((one, other)) not in same:
                assert abs(logs[one] - logs[other]) > 10 * TOLERANCE, (one, other)


@pytest.mark.parametrize("scheme", make.SCHEMES)
def test_quantized_values_are_read_byte_for_byte(scheme: str, samples: Path) -> None:
    assert make.digest(make.quantized_values(samples / scheme)) == EXPECTED["quantized"][scheme]
    stored = load_file(samples / scheme / "model.safetensors")
    read = {(name, part): content for name, part, content in make.quantized_values(samples / scheme)}
    assert len(read) > 10
    for (name, part), content in read.items():
        key = f"{name}.weight" if part == "weight" else f"{name}.{part}"
        assert stored[key].numpy().tobytes() == content


@pytest.mark.parametrize("path", ["run", "run@5", "run/checkpoints/step-00000005/best"])
def test_an_adapter_gives_the_same_logits_in_peft(path: str, samples: Path) -> None:
    folder = adapter_folder(Path(path), say=pytest.fail, warn=pytest.fail)
    source = FolderSource(samples / "model")
    model: Decoder = load(source, scheme_named("none"), dtype=torch.float32, device=torch.device("cpu"))
    ids = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = model(ids)
        apply_(model, peft.read(folder))
        ours = model(ids)
        base = AutoModelForCausalLM.from_pretrained(samples / "model", dtype=torch.float32)
        theirs = PeftModel.from_pretrained(base, folder)(ids).logits
    assert (theirs - plain).abs().max() > 0.1
    assert (theirs - ours).abs().max() <= 3e-4  # as in tests/store/test_adapters.py


VERSIONS = {  # file -> (the command that reads it, the version that is read)
    "run/run.json": (("finetune", "--resume", "--out", "run"), 1),
    "run/checkpoints/step-00000005/manifest.json": (("finetune", "--resume", "--out", "run"), 2),
    "run/adapter/octavo.json": (("generate", "the", "--model", "model", "--adapter", "run"), 1),
    **{f"{name}/manifest.json": (("generate", "the", "--model", name), 1) for name in make.SCHEMES},
    **{f"{name}/config.json": (("generate", "the", "--model", name), 1) for name in make.SCHEMES},
}


@pytest.mark.parametrize("file", VERSIONS)
def test_an_unknown_version_is_an_error_that_names_both(file: str, octavo: Octavo, samples: Path) -> None:
    command, read = VERSIONS[file]
    path = samples / file
    content = json.loads(path.read_bytes())
    versioned = content["octavo"] if path.name == "config.json" else content
    assert versioned["format"] == read
    versioned["format"] = 77
    path.write_text(json.dumps(content))
    if path.name == "config.json":
        (path.parent / "manifest.json").unlink()  # it has the hash of config.json
    before = files_of(samples)
    done = octavo(*command)
    assert done.code == 1
    assert re.search(rf"has the format version 77; this octavo reads version {read}\.\n.+", done.err), done.err
    assert files_of(samples) == before


def test_the_version_of_a_run_is_checked_before_its_settings_are_read(octavo: Octavo, samples: Path) -> None:
    (samples / "run" / "run.json").write_text('{"format": 77}')
    with (samples / "run" / "config.yaml").open("a") as file:
        file.write("a_later_option: 1\n")
    assert "has the format version 77" in octavo("finetune", "--resume", "--out", "run").err


def test_the_samples_are_small_and_name_no_path_of_the_machine_that_made_them() -> None:
    files = [path for path in make.HERE.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")]
    assert sum(path.stat().st_size for path in files) < LIMIT_BYTES
    for path in files:
        assert str(make.HERE).encode() not in path.read_bytes(), path
