"""The benchmark scripts on two narrow layers: every peer runs, has the reference's loss, and fills all columns."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from runpy import run_path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from octavo.models import FAMILIES
from octavo.models.composite import COMPOSITES

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = sorted(path.stem for path in BENCHMARKS.glob("*.py") if "__main__" in path.read_text("utf-8"))
# Columns that may be empty: values of a GPU, of a job, or of an option that is not set.
OPTIONAL = {"seconds", "device_used_gib", "pinned_gib", "cap_gib", "commit", "note"}
# nf4 changes the weights, so its loss and gradients differ from the reference as much as octavo's nf4 does; all others
# round to 8 bits or more.
MIN_COSINES = {"peft-bf16": 0.999, "peft-bf16-sdpa": 0.999, "peft-int8": 0.999, "article": 0.998, "peft-nf4": 0.95}
MAX_LOSS_GAPS = dict.fromkeys(MIN_COSINES, 2e-3) | {"peft-nf4": 1e-2}


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
    """Files with the float32 reference's loss and gradients, by model."""
    files = {name: str(tmp_path_factory.mktemp("reference") / f"{name}.pt") for name in ("gptj", "llama")}
    for name, file in files.items():
        row = measure.measured(setting(measure, "reference", name, reference=file, steps=0, warmup=0))
        assert row["note"] == ""
    return files


def setting(measure: ModuleType, method: str, model: str, **options: Any) -> Any:
    fields = {"batch": 2, "seq_len": 16, "steps": 2, "warmup": 1, "tiny": True, **options}
    return measure.Setting(method, model, **fields)


@pytest.mark.parametrize("model", ["gptj", "llama"])
@pytest.mark.parametrize("method", MIN_COSINES)
def test_a_peer_has_the_loss_and_gradients_of_the_reference_and_a_complete_row(
    measure: ModuleType, references: dict[str, str], tmp_path: Path, method: str, model: str
) -> None:
    row = measure.measured(setting(measure, method, model, reference=references[model]))
    assert row["note"] == ""
    assert row["cosine_min"] > MIN_COSINES[method]
    assert abs(row["loss_gap"]) < MAX_LOSS_GAPS[method]
    table = import_module("table")
    table.append(tmp_path / "results.csv", row)
    with (tmp_path / "results.csv").open(newline="") as file:
        (written,) = csv.DictReader(file)
    assert tuple(written) == table.COLUMNS
    assert {name for name, value in written.items() if value == ""} <= OPTIONAL
    assert float(written["p10"]) <= float(written["tokens_per_second"]) <= float(written["p90"])


@pytest.mark.parametrize("scheme", ["int8", "nf4", "nf4-double"])
@pytest.mark.parametrize("model", ["gptj", "llama"])
def test_octavo_has_the_gradients_of_float32_over_its_dequantized_weights(
    measure: ModuleType, references: dict[str, str], tmp_path: Path, scheme: str, model: str
) -> None:
    """All of what remains without quantization is the arithmetic, here float32; quantization alone is far more."""
    finetune = import_module("finetune")
    settings = [setting(measure, f"octavo-{scheme}", model)]
    rows = finetune.with_references(settings, tmp_path, dequantized=True)
    assert [row.method for row in rows] == ["reference", f"reference-{scheme}", f"octavo-{scheme}"]
    rounded, row = (
        measure.measured(replace(row, original=references[model] if row.original else None)) for row in rows[1:]
    )
    assert rounded["note"].startswith("quantization alone: cosine 0.9")
    assert row["note"].startswith("forecast ")
    assert rounded["note"] in row["note"]
    assert row["cosine_min"] > 0.99999
    assert abs(row["loss_gap"]) < 1e-6
    again = finetune.with_references(settings, tmp_path, dequantized=True)  # the file of one reference is there
    assert [row.method for row in again] == ["reference", f"octavo-{scheme}"]
    cosine = float(rounded["note"].split()[3].rstrip(","))
    assert 1 - cosine > 10 * (1 - row["cosine"])


@pytest.mark.parametrize(("method", "kind"), [("peft-int8", "Linear8bitLt"), ("peft-nf4", "Linear4bit")])
def test_a_quantized_peer_uses_the_bitsandbytes_layers_of_peft(method: str, kind: str) -> None:
    peer = import_module("peers").build(method, "gptj", seed=0, device="cpu", tiny=True)
    layers = [type(module) for module in peer.model.modules() if type(module).__module__ == "peft.tuners.lora.bnb"]
    assert [layer.__name__ for layer in layers] == [kind] * 12


def test_the_row_of_a_failed_method_contains_the_error(measure: ModuleType) -> None:
    row = measure.measured(setting(measure, "peft-nonsense", "gptj"))
    assert "KeyError" in row["note"]
    assert row["tokens_per_second"] is None


def test_the_checkpoint_for_unsloth_contains_the_weights_of_all_methods(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    unsloth, shapes = import_module("unsloth_method"), import_module("shapes")
    unsloth.write_checkpoint(tmp_path / "checkpoint", "llama", seed=3, device="cpu", tiny=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint")
    loaded = dict(model.named_parameters())
    assert "lm_head.weight" in loaded
    assert len(loaded) == 3 + 2 * 9
    for name, actual in loaded.items():
        expected = shapes.weight(name, tuple(actual.shape), "cpu", torch.bfloat16, seed=3)
        assert actual.dtype == torch.bfloat16, name
        assert torch.equal(actual, expected), name
    assert model.config.rope_parameters["rope_theta"] == 500000.0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "checkpoint")
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_unsloth_is_imported_before_the_libraries_that_it_patches(tmp_path: Path) -> None:
    """Runs the row's process with a fake unsloth whose import fails with the list of libraries imported before it."""
    source = "import sys\nraise ImportError('after', {'transformers', 'peft', 'trl'} & {*sys.modules})\n"
    (tmp_path / "unsloth.py").write_text(source)
    for name in ("unsloth", "unsloth_zoo", "trl"):
        (tmp_path / f"{name}-7.dist-info").mkdir()
        (tmp_path / f"{name}-7.dist-info" / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 7\n")
    finetune = import_module("finetune")
    row = {"method": "unsloth-nf4", "model": "llama", "tiny": True, "seq_len": 16}
    command = [sys.executable, str(BENCHMARKS / "finetune.py"), "--one", json.dumps(row)]
    env = finetune.environment({"PYTHONPATH": f"{tmp_path}:{BENCHMARKS.parent / 'src'}"})
    ran = subprocess.run(command, capture_output=True, text=True, env=env)
    printed = finetune.last_row(ran.stdout)
    assert printed["note"] == "unsloth 7, unsloth_zoo 7, trl 7; ImportError: ('after', set())", ran.stderr
    assert printed["scheme"] == "nf4"


@pytest.mark.parametrize(
    ("method", "model", "tokens", "message"),
    [("unsloth-int8", "llama", 16, "KeyError"), ("unsloth-nf4", "llama", 4096, "rows of 4096 tokens")],
)
def test_unsloth_rejects_unsupported_settings(
    measure: ModuleType, method: str, model: str, tokens: int, message: str
) -> None:
    assert message in measure.measured(setting(measure, method, model, seq_len=tokens))["note"]


def test_compare_gradients_finds_the_adapter_that_differs(measure: ModuleType) -> None:
    generator = torch.Generator().manual_seed(0)
    reference = {f"layer.{n}": torch.randn(4, 8, generator=generator) for n in range(3)}
    same = measure.compare_gradients(reference, {name: 2 * gradient for name, gradient in reference.items()})
    assert same["cosine"] == pytest.approx(1.0)
    assert same["cosine_min"] == pytest.approx(1.0)
    assert same["ratio_max"] == pytest.approx(2.0)
    negated = {**reference, "layer.1": -reference["layer.1"]}
    comparison = measure.compare_gradients(reference, negated)
    assert (comparison["worst"], comparison["missing"]) == ("layer.1", [])
    assert comparison["cosine_min"] == pytest.approx(-1.0)
    squares = {name: float(gradient.square().sum()) for name, gradient in reference.items()}
    assert comparison["cosine"] == pytest.approx(1 - 2 * squares["layer.1"] / sum(squares.values()))


@pytest.mark.parametrize("fault", [None, torch.zeros(4, 8), torch.full((4, 8), torch.nan), torch.ones(8, 4)])
def test_compare_gradients_reports_an_adapter_without_a_valid_gradient_as_missing(
    measure: ModuleType, fault: torch.Tensor | None
) -> None:
    reference = {"a": torch.ones(4, 8), "b": torch.ones(4, 8)}
    ours = {"a": torch.ones(4, 8)} | ({"b": fault} if fault is not None else {})
    comparison = measure.compare_gradients(reference, ours)
    assert comparison["missing"] == ["b"]
    assert comparison["cosine_min"] == 0.0
    assert comparison["cosine"] == pytest.approx(0.5**0.5)


@pytest.mark.parametrize(
    ("scheme", "cosine", "cosine_min", "note"),
    [
        ("int8", 0.995, 0.991, ""),
        ("int8", 0.995, 0.985, "gradient cosine 0.985 at layer.0"),
        ("int8-8bit", 0.995, 0.985, ""),
        ("int8-8bit-no-offload", 0.995, 0.985, ""),
        ("int8-8bit", 0.995, 0.975, "gradient cosine 0.975 at layer.0"),
        ("int8-8bit", 0.985, 0.985, "gradient cosine 0.985"),
        ("nf4", 0.95, 0.91, ""),
    ],
)
def test_a_row_with_a_low_gradient_cosine_has_a_note(
    measure: ModuleType, scheme: str, cosine: float, cosine_min: float, note: str
) -> None:
    comparison = {
        "cosine": cosine,
        "cosine_min": cosine_min,
        "cosine_median": cosine,
        "worst": "layer.0",
        "missing": [],
    }
    result: dict[str, Any] = {"scheme": scheme, "note": ""}
    measure.note_gradients_(result, comparison)
    assert result["note"] == note
    assert result["cosine"] == cosine


@pytest.fixture(scope="module")
def plan() -> ModuleType:
    return import_module("plan")


def test_the_memory_benchmark_has_four_settings_of_every_family(plan: ModuleType) -> None:
    settings = list(plan.family_settings())
    shapes = import_module("shapes")
    types = [shapes.shapes(setting.model)["model_type"] for setting in settings]
    composites = {composite[0] for composite in COMPOSITES.values()}
    assert {kind: types.count(kind) for kind in types} == dict.fromkeys(
        composites | {kind for kind, _ in FAMILIES.values()}, 4
    )
    assert len(set(settings)) == len(settings)


@pytest.mark.exhaustive
def test_the_memory_benchmark_continues_after_a_failure_and_saves_its_rows(
    plan: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of three families: learned positions, windows with soft-capped scores, and the text part of a composite."""
    models = {"gpt2-xl-20", "gemma-2-2b-8", "gemma-3-4b-6"}
    settings = [replace(each, seq_len=16, document=each.document and 6) for each in plan.family_settings()]
    settings = [each for each in settings if each.model in models]
    settings.insert(1, replace(settings[0], model="nonsense"))
    with ThreadPoolExecutor(1) as pool:
        rows = plan.measure_all(settings, pool, tiny=True, out=tmp_path / "plan.csv")
    printed = capsys.readouterr()
    assert printed.out.count("\nmodel=") + printed.out.startswith("model=") == len(rows) == len(settings) - 1
    assert "model='nonsense'" in printed.out
    assert "KeyError: 'nonsense'" in printed.err
    assert [row["error_percent"] for row in rows] == ["unmeasured"] * len(rows)
    saved = [[row[level] for level in ("all", "attention", "input")] for row in rows]
    assert saved == [[2, 0, 0], [0, 0, 2]] * (len(rows) // 2)  # also those that recompute
    with (tmp_path / "plan.csv").open(newline="") as file:
        written = list(csv.DictReader(file))
    assert [tuple(row) for row in written] == [plan.COLUMNS] * len(rows)


def test_the_memory_benchmark_names_the_settings_with_large_errors(plan: ModuleType) -> None:
    row = dict.fromkeys(plan.COLUMNS, "") | {"model": "a", "error_percent": -5.01}
    others = [row | {"model": "b", "error_percent": 5.0}, row | {"model": "c", "error_percent": "unmeasured"}]
    assert plan.summary([row, *others], failed=2).splitlines() == [
        "3 settings, 2 failed, 2 measured",
        "largest error -5.01 % (model=a error_percent=-5.01)",
        "1 beyond 5 %: model=a error_percent=-5.01",
    ]
    assert plan.summary([], failed=1) == "0 settings, 1 failed, 0 measured\n"


def test_a_batch_of_packed_documents(plan: ModuleType) -> None:
    batch = import_module("octavo_method").make_batch(torch.arange(7)[None], document=3)
    assert batch.piece.tolist() == [[0, 0, 0, 1, 1, 1, 2]]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1, 2, 0]]
    assert batch.labels.tolist() == [[1, 2, -100, 4, 5, -100, -100]]


def test_the_table_of_the_readme_shows_the_newest_row() -> None:
    table = import_module("table")
    row = {**dict.fromkeys(table.COLUMNS, ""), "method": "octavo-int8", "model": "gptj", "batch": 1, "seq_len": 128}
    shown = table.markdown([row | {"tokens_per_second": 10}, row | {"tokens_per_second": 4321.6, "note": "a|b"}])
    assert "4,322" in shown
    assert "| 10 |" not in shown
    marked = f"before\n{table.MARKER}\nold\n{table.MARKER}\nafter\n"
    assert table.put(marked, shown) == f"before\n{table.MARKER}\n{shown}{table.MARKER}\nafter\n"


def test_the_readme_is_current() -> None:
    """The table of benchmarks/README.md is the one that table.py writes from results.csv."""
    table = import_module("table")
    rows = table.read(table.RESULTS)
    text = (BENCHMARKS / "README.md").read_text("utf-8")
    assert tuple(rows[0]) == table.COLUMNS
    assert table.put(text, table.brief(rows)) == text


@pytest.mark.parametrize(
    ("name", "message"), [("NOPE", "'NOPE'.*T4, P100"), ("T4", "--pretend T4 needs an NVIDIA GPU")]
)
@pytest.mark.parametrize("job", [[], ["--job", "article", "--model-dir", "."]])
def test_a_gpu_that_cannot_be_pretended_is_an_error_before_any_row(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, message: str, job: list[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    finetune, out = import_module("finetune"), tmp_path / "rows.csv"
    options = ["--rows", "octavo-int8", "--tiny", "--pretend", name, "--commit", "", "--out", str(out), *job]
    monkeypatch.setattr(sys, "argv", ["finetune.py", *options])
    with pytest.raises(SystemExit, match=f"(?s){message}") as ended:
        finetune.main()
    assert isinstance(ended.value.code, str)  # a message and exit status 1
    assert not out.exists()


def outcome(ran: Any) -> Any:
    """A replacement of subprocess.run that always has the outcome `ran`, and notes the commands in `ran.commands`."""
    ran.commands = []

    def run(command: list[str], **_: Any) -> Any:
        ran.commands.append(command)
        return ran

    return run


RESTRICTED_GPU = {"gpu": "NVIDIA H200 restricted to Tesla T4", "octavo": "7"}


def test_the_job_as_on_another_gpu_runs_and_is_labelled_as_such(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Also if it fails."""
    finetune = import_module("finetune")
    failed = SimpleNamespace(returncode=1, stderr="out of memory", stdout="")
    monkeypatch.setattr(finetune.subprocess, "run", outcome(failed))
    monkeypatch.setattr(finetune, "gpu_and_version", {"T4": RESTRICTED_GPU}.__getitem__)
    out = tmp_path / "restricted.csv"
    options = ["--job", "article", "--model-dir", str(tmp_path), "--pretend", "T4", "--commit", "", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["finetune.py", *options])
    finetune.main()
    (row,) = import_module("table").read(out)
    assert row["gpu"] == RESTRICTED_GPU["gpu"]
    assert "--pretend T4" in row["command"]
    assert "--pretend T4" in " ".join(failed.commands[-1])


def test_the_options_of_finetune_cannot_have_the_other_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its row would be one of the GPU that is there."""
    options = ["--job", "article", "--model-dir", str(tmp_path), "--out", str(tmp_path / "rows.csv")]
    options += ["--extra", "--pretend=T4"]
    monkeypatch.setattr(sys, "argv", ["finetune.py", *options])
    with pytest.raises(SystemExit, match="--pretend before --extra"):
        import_module("finetune").main()


def test_rows_without_a_result_have_the_gpu_of_their_restriction(
    measure: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The reference, which runs without the restriction, does not change it."""
    finetune, table = import_module("finetune"), import_module("table")

    class Process:
        def __init__(self, row: Any, alloc: str) -> None:
            self.row = row

        def result(self, limit_s: float) -> dict[str, Any]:
            measured = {"gpu": "NVIDIA H200", "octavo": "7", "first_loss": 1.0}
            row: dict[str, Any] = measure.blank(self.row)
            return row | (measured if self.row.is_reference else {"note": "stopped after 9 s"})

    monkeypatch.setattr(finetune, "Process", Process)
    args = Namespace(budget_s=float("inf"), limit_s=9.0, alloc="", no_prefetch=True, out=tmp_path / "rows.csv")
    for pretend, known in (("T4", RESTRICTED_GPU), (None, {})):
        rows = [setting(measure, f"octavo-{scheme}", "gptj", pretend=pretend) for scheme in ("int8", "nf4")]
        finetune.run_all(finetune.with_references(rows, tmp_path), args, "", known=known)
    gpus = [(row["gpu"], row["octavo"]) for row in table.read(args.out)]
    assert gpus == [(RESTRICTED_GPU["gpu"], "7")] * 2 + [("NVIDIA H200", "7")] * 2


def test_the_table_shows_rows_as_on_every_gpu(measure: ModuleType) -> None:
    """In a table for each; rows of another real GPU replace older ones."""
    table = import_module("table")
    row = dict.fromkeys(table.COLUMNS, "") | {"method": "octavo-int8", "model": "gptj", "batch": "1", "seq_len": "128"}
    gpus = ["H100", "H200", "H200 restricted to Tesla T4", "H200 restricted to RTX A6000"]
    rows = [row | {"gpu": gpu, "tokens_per_second": str(n)} for n, gpu in enumerate(gpus, start=111)]
    assert table.newest(rows) == rows[1:]
    tables = table.brief(rows).split("\n\n")
    assert [text.splitlines()[-1] for text in tables[::2]] == [f"{gpu}:" for gpu in gpus[1:2] + gpus[:1:-1]]


def test_only_the_results_of_real_gpus_are_written_into_the_readme(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    table = import_module("table")
    monkeypatch.setattr(table, "README", tmp_path / "README.md")
    monkeypatch.setattr(table, "RESULTS", tmp_path / "results.csv")
    old = f"{table.MARKER}\nold\n{table.MARKER}\n"
    row = {"method": "octavo-int8", "model": "gptj", "batch": 1, "seq_len": 128, "tokens_per_second": 10}
    other, another = tmp_path / "restricted.csv", tmp_path / "OTHER.md"
    for path in (table.RESULTS, other):
        table.append(path, row)
    for path in (table.README, another):
        path.write_text(old)

    def run(*options: str) -> None:
        monkeypatch.setattr(sys, "argv", ["table.py", *options])
        table.main()

    run("--results", str(other))
    assert table.README.read_text() == old
    run("--results", str(other), "--readme", str(another))
    assert (table.README.read_text() == old, "octavo-int8" in another.read_text()) == (True, True)
    run()
    assert "octavo-int8" in table.README.read_text()


@pytest.mark.parametrize(
    ("method", "references"),
    [
        ("octavo-int8-8bit-no-offload", ["reference", "reference-int8"]),
        ("octavo-nf4-8bit", ["reference", "reference-nf4"]),
        ("octavo-nf4-double-8bit", ["reference", "reference-nf4-double"]),
        ("octavo-none", ["reference"]),
        ("octavo-dynamic8", ["reference"]),
        ("peft-bf16", ["reference"]),
        ("peft-int8", ["reference"]),  # does not quantize the head
        ("peft-nf4", ["reference"]),  # double quantization, and so is unsloth-nf4
        ("unsloth-nf4", ["reference"]),
        ("article", ["reference"]),
    ],
)
def test_only_the_weights_of_a_method_are_its_dequantized_reference(
    measure: ModuleType, tmp_path: Path, method: str, references: list[str]
) -> None:
    finetune = import_module("finetune")
    *made, row = finetune.with_references([setting(measure, method, "llama")], tmp_path, dequantized=True)
    assert [reference.method for reference in made] == references
    assert row.reference == made[-1].reference
    assert row.original == (made[0].reference if len(made) == 2 else None)
    assert f"--gate {'dequantized' if len(made) == 2 else 'original'}" in row.command


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_prints_its_help(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Runs the script in this process, where the imports of other scripts are cached."""
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as ended:
        run_path(str(BENCHMARKS / f"{script}.py"), run_name="__main__")
    assert ended.value.code == 0
    assert "usage:" in capsys.readouterr().out
