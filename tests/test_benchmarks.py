"""The benchmark's harness on two narrow layers: every peer runs, is the same function, and gives a whole row."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
# Which columns may be empty: what only a card has, what nobody asked for.
OPTIONAL = {"seconds", "device_used_gib", "pinned_gib", "cap_gib", "commit", "note"}
# Gradients of 4-bit weights are those of other weights, and so is their loss, by as much as octavo's own nf4 differs
# from the reference; all else rounds at 8 bits or more.
COSINES = {"peft-bf16": 0.999, "peft-bf16-sdpa": 0.999, "peft-int8": 0.999, "article": 0.998, "peft-nf4": 0.95}
LOSS_GAPS = dict.fromkeys(COSINES, 2e-3) | {"peft-nf4": 1e-2}


@pytest.fixture(scope="module", autouse=True)
def _path() -> Any:
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def measure() -> ModuleType:
    return import_module("measure")


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory, measure: ModuleType) -> dict[str, str]:
    """The float32 reference's gradients of each model."""
    files = {name: str(tmp_path_factory.mktemp("reference") / f"{name}.pt") for name in ("gptj", "llama")}
    for name, file in files.items():
        row = measure.measured(setting(measure, "reference", name, reference=file, steps=0, warmup=0))
        assert row["note"] == ""
    return files


def setting(measure: ModuleType, way: str, model: str, **more: Any) -> Any:
    asked = {"batch": 2, "seq_len": 16, "steps": 2, "warmup": 1, "tiny": True, **more}
    return measure.Setting(way, model, **asked)


@pytest.mark.parametrize("model", ["gptj", "llama"])
@pytest.mark.parametrize("way", COSINES)
def test_a_peer_has_the_references_loss_and_gradients_and_fills_its_row(
    measure: ModuleType, references: dict[str, str], tmp_path: Path, way: str, model: str
) -> None:
    row = measure.measured(setting(measure, way, model, reference=references[model]))
    assert row["note"] == ""
    assert row["cosine_min"] > COSINES[way]
    assert abs(row["loss_gap"]) < LOSS_GAPS[way]
    table = import_module("table")
    table.append(tmp_path / "results.csv", row)
    with (tmp_path / "results.csv").open(newline="") as file:
        (written,) = csv.DictReader(file)
    assert tuple(written) == table.COLUMNS
    assert {name for name, value in written.items() if value == ""} <= OPTIONAL
    assert float(written["p10"]) <= float(written["tokens_per_second"]) <= float(written["p90"])


@pytest.mark.parametrize(("way", "kind"), [("peft-int8", "Linear8bitLt"), ("peft-nf4", "Linear4bit")])
def test_a_quantised_peer_runs_the_layers_that_peft_made_for_bitsandbytes(way: str, kind: str) -> None:
    peer = import_module("peers").build(way, "gptj", seed=0, device="cpu", tiny=True)
    tuned = [type(each) for each in peer.model.modules() if type(each).__module__ == "peft.tuners.lora.bnb"]
    assert [each.__name__ for each in tuned] == [kind] * 12


def test_a_way_that_fails_has_its_error_in_its_row(measure: ModuleType) -> None:
    row = measure.measured(setting(measure, "peft-nonsense", "gptj"))
    assert "KeyError" in row["note"]
    assert row["tokens_per_second"] is None


def test_unsloth_loads_a_checkpoint_with_the_weights_of_every_way(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    way, shapes = import_module("unsloth_way"), import_module("shapes")
    way.write_checkpoint(tmp_path / "it", "llama", seed=3, device="cpu", tiny=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "it")
    loaded = dict(model.named_parameters())
    assert "lm_head.weight" in loaded
    assert len(loaded) == 3 + 2 * 9
    for name, found in loaded.items():
        wanted = shapes.weight(name, tuple(found.shape), "cpu", torch.bfloat16, seed=3)
        assert found.dtype == torch.bfloat16, name
        assert torch.equal(found, wanted), name
    assert model.config.rope_parameters["rope_theta"] == 500000.0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "it")
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_unsloth_comes_before_what_it_patches(tmp_path: Path) -> None:
    """In the process of its row, run with an unsloth of ours that says what was loaded before it and fails."""
    told = "import sys\nraise ImportError('after', {'transformers', 'peft', 'trl'} & {*sys.modules})\n"
    (tmp_path / "unsloth.py").write_text(told)
    for name in ("unsloth", "unsloth_zoo", "trl"):
        (tmp_path / f"{name}-7.dist-info").mkdir()
        (tmp_path / f"{name}-7.dist-info" / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 7\n")
    finetune = import_module("finetune")
    row = {"way": "unsloth-nf4", "model": "llama", "tiny": True, "seq_len": 16}
    command = [sys.executable, str(BENCHMARKS / "finetune.py"), "--one", json.dumps(row)]
    env = finetune.environment({"PYTHONPATH": f"{tmp_path}:{BENCHMARKS.parent / 'src'}"})
    ran = subprocess.run(command, capture_output=True, text=True, env=env)
    found = finetune.last_row(ran.stdout)
    assert found["note"] == "unsloth 7, unsloth_zoo 7, trl 7; ImportError: ('after', set())", ran.stderr
    assert found["scheme"] == "nf4"


@pytest.mark.parametrize(
    ("way", "model", "tokens", "said"),
    [("unsloth-int8", "llama", 16, "KeyError"), ("unsloth-nf4", "llama", 4096, "rows of 4096 tokens")],
)
def test_unsloth_refuses_what_it_would_not_measure(
    measure: ModuleType, way: str, model: str, tokens: int, said: str
) -> None:
    assert said in measure.measured(setting(measure, way, model, seq_len=tokens))["note"]


def test_compare_gradients_finds_the_adapter_that_differs(measure: ModuleType) -> None:
    draw = torch.Generator().manual_seed(0)
    reference = {f"layer.{n}": torch.randn(4, 8, generator=draw) for n in range(3)}
    same = measure.compare_gradients(reference, {name: 2 * each for name, each in reference.items()})
    assert same["cosine"] == pytest.approx(1.0)
    assert same["cosine_min"] == pytest.approx(1.0)
    assert same["ratio_max"] == pytest.approx(2.0)
    turned = {**reference, "layer.1": -reference["layer.1"]}
    found = measure.compare_gradients(reference, turned)
    assert (found["worst"], found["missing"]) == ("layer.1", [])
    assert found["cosine_min"] == pytest.approx(-1.0)
    squares = {name: float(each.square().sum()) for name, each in reference.items()}
    assert found["cosine"] == pytest.approx(1 - 2 * squares["layer.1"] / sum(squares.values()))


@pytest.mark.parametrize("fault", [None, torch.zeros(4, 8), torch.full((4, 8), torch.nan), torch.ones(8, 4)])
def test_compare_gradients_counts_an_adapter_without_a_gradient_as_different(
    measure: ModuleType, fault: torch.Tensor | None
) -> None:
    reference = {"a": torch.ones(4, 8), "b": torch.ones(4, 8)}
    ours = {"a": torch.ones(4, 8)} | ({"b": fault} if fault is not None else {})
    found = measure.compare_gradients(reference, ours)
    assert found["missing"] == ["b"]
    assert found["cosine_min"] == 0.0
    assert found["cosine"] == pytest.approx(0.5**0.5)


@pytest.mark.parametrize(
    ("scheme", "cosine", "least", "said"),
    [
        ("int8", 0.995, 0.991, ""),
        ("int8", 0.995, 0.985, "gradient cosine 0.985 at layer.0"),
        ("int8-8bit", 0.995, 0.985, ""),
        ("int8-8bit-card", 0.995, 0.985, ""),
        ("int8-8bit", 0.995, 0.975, "gradient cosine 0.975 at layer.0"),
        ("int8-8bit", 0.985, 0.985, "gradient cosine 0.985"),
        ("nf4", 0.95, 0.91, ""),
    ],
)
def test_a_row_whose_gradients_are_too_far_off_says_so(
    measure: ModuleType, scheme: str, cosine: float, least: float, said: str
) -> None:
    told = {"cosine": cosine, "cosine_min": least, "cosine_median": cosine, "worst": "layer.0", "missing": []}
    result: dict[str, Any] = {"scheme": scheme, "note": ""}
    measure.note_gradients_(result, told)
    assert result["note"] == said
    assert result["cosine"] == cosine


def test_the_readme_keeps_the_newest_row_between_its_markers() -> None:
    table = import_module("table")
    row = {**dict.fromkeys(table.COLUMNS, ""), "way": "octavo-int8", "model": "gptj", "batch": 1, "seq_len": 128}
    shown = table.markdown([row | {"tokens_per_second": 10}, row | {"tokens_per_second": 4321.6, "note": "a|b"}])
    assert "4,322" in shown
    assert "| 10 |" not in shown
    marked = f"before\n{table.MARKER}\nold\n{table.MARKER}\nafter\n"
    assert table.put(marked, shown) == f"before\n{table.MARKER}\n{shown}{table.MARKER}\nafter\n"
