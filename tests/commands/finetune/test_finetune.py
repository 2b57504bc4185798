"""A complete run: the files of its folder, the evaluation of the saved adapter, and errors."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tests import devices

from octavo import adapters
from octavo.commands import loading
from octavo.commands.finetune import finetune
from octavo.config import Config, commands
from octavo.errors import AdapterError, TrainingError, UsageError
from octavo.models import Decoder
from octavo.ops.quantize import scheme_named
from octavo.reporting import Report, shown
from octavo.store import peft
from octavo.store.sources import FolderSource, fingerprint

Octavo = Callable[..., Any]
Settings = Callable[..., Config]
Tune = Callable[..., dict[str, Any]]

EVERYTHING = {"train_norms": True, "train_biases": True}
CPU = devices.hardware(devices.CPU)
IDS = torch.tensor([[2, 40, 41, 42, 43, 44, 45, 46, 47, 2, 90, 91]])


def events(folder: Path, name: str) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == name]


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def adapter_hash(folder: Path) -> str:
    return sha256((folder / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


def tuned_model(folder: Path, base: Path) -> Decoder:
    """The base, unquantized, with the adapter of a run on it."""
    with Report(console=False) as report:
        model = loading.load_model(FolderSource(base), scheme_named("none"), CPU, report)
        adapters.apply_(model, loading.read_adapter(folder / "adapter", FolderSource(base), report)[1])
    return model


@pytest.fixture(scope="module")
def finished(tune: Tune, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """(folder, JSON result) of a run. Read-only."""
    out = tmp_path_factory.mktemp("runs") / "run"
    return out, tune(out, checkpoint_every=3, eval_every=2, sample_every=4)


def test_the_run_folder_contains_all_documented_files(finished: tuple[Path, dict[str, Any]], tiny_llama: Path) -> None:
    out, result = finished
    assert {path.name for path in out.iterdir()} - {".lock"} == {
        "run.json", "config.yaml", "ledger.json", "metrics.jsonl", "adapter", "checkpoints", "report.html",
    }  # fmt: skip
    origin = json.loads((out / "adapter" / "octavo.json").read_text())
    assert origin["base"]["sha256"] == fingerprint(FolderSource(tiny_llama))
    assert origin["base"]["sha256"] in (out / "adapter" / "README.md").read_text()
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(contents(out / "adapter"))
    assert (result["adapter"], result["report"]) == (str(out / "adapter"), str(out / "report.html"))
    ledger = json.loads((out / "ledger.json").read_text())
    assert {side: len(ledger[side]["files"]) for side in ledger} == {"train": 6, "test": 1}


def test_every_step_is_recorded_and_the_loss_decreases(finished: tuple[Path, dict[str, Any]]) -> None:
    out, result = finished
    steps = events(out, "step")
    assert [step["step"] for step in steps] == [1, 2, 3, 4, 5, 6]
    assert {"loss", "learning_rate", "grad_norm", "tokens", "trained_tokens", "tokens_per_second"} <= steps[0].keys()
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.3
    assert result["train_loss"] == steps[-1]["loss"]
    quantized, tuned = result["rows"]
    assert tuned["perplexity"] < 0.75 * quantized["perplexity"]


def test_the_gain_on_the_held_out_text_has_an_interval_also_in_a_resumed_run(tune: Tune, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = tune(out, seq_len=12)  # 12 rows of the one play
    (base, tuned), [gain] = result["rows"], result["differences"]
    assert (gain["before"], gain["after"]) == ("quantized base", "tuned")
    assert gain["before_scheme"] == gain["after_scheme"] == "int8"
    assert gain["lower_by"] == base["loss"] - tuned["loss"] > 0
    assert 0 < gain["interval"]["low"] < gain["lower_by"] < gain["interval"]["high"]
    assert gain["interval"]["over"] == "rows in order", "the held-out text is one play"
    assert events(out, "evaluation")[-1]["differences"] == [gain]
    assert "loss of quantized base" in (out / "report.html").read_text()
    stopped = tmp_path / "stopped"
    assert tune(stopped, seq_len=12, stop_after=3)["differences"] == []
    resumed = tune(stopped, seq_len=12, resume=True)
    assert resumed["differences"] == [gain]
    assert resumed["verdict"] == result["verdict"]
    assert [{**event, "time": ""} for event in events(stopped, "heldout")] == [
        {**event, "time": ""} for event in events(out, "heldout")
    ]


def test_the_verdict_is_in_the_result_and_on_top_of_the_report(tune: Tune, tmp_path: Path) -> None:
    result = tune(tmp_path / "run", seq_len=12, eval_every=2)
    [gain], verdict = result["differences"], result["verdict"]
    assert verdict["change"] == "better"
    assert verdict["sentences"][0].startswith("Better by ")
    assert verdict["gain"] == pytest.approx(result["rows"][0]["bits_per_byte"] - result["rows"][1]["bits_per_byte"])
    half = (gain["interval"]["high"] - gain["interval"]["low"]) / 2
    assert verdict["plus_minus"] / verdict["gain"] == pytest.approx(half / gain["lower_by"])
    assert verdict["trend"] in ("falling", "flat")
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.index("Better by ") < page.index("<h2>Training</h2>")
    first, second, third = events(tmp_path / "run", "heldout")
    assert (first["passes_before"], first["lowest_step"]) == (0, 0)
    assert second["passes_before"] == first["passes"] == pytest.approx(third["passes"] / 3)
    middle = (second["fall"]["high"] + second["fall"]["low"]) / 2
    assert middle == pytest.approx(first["loss"] - second["loss"])


def test_held_out_losses_with_a_sliding_window_do_not_depend_on_the_row_length(tune: Tune, tmp_path: Path) -> None:
    bases = [
        tune(tmp_path / str(length), seq_len=length, window=40, stride=20, steps=1)["rows"][0] for length in (12, 24)
    ]
    assert bases[0] == bases[1]
    assert (bases[0]["context"], bases[0]["stride"]) == (40, 20)


def test_the_overlap_of_held_out_and_training_text_is_recorded_once(finished: tuple[Path, dict[str, Any]]) -> None:
    out, result = finished
    (event,) = events(out, "overlap")
    overlap = json.loads((out / "ledger.json").read_text())["test"]["overlap"]
    assert overlap["tokens"] > 100
    assert overlap.items() <= event.items()
    assert [row["also_in_training"] for row in result["rows"]] == [overlap["share"]] * 2


def test_held_out_losses_and_samples_are_recorded_at_their_steps(finished: tuple[Path, dict[str, Any]]) -> None:
    out, _ = finished
    assert [event["step"] for event in events(out, "heldout")] == [2, 4, 6]
    samples = [(event["which"], event["step"]) for event in events(out, "sample")]
    assert samples == [("base", 0), ("training", 4), ("tuned", 6)]


def test_the_report_contains_the_scores_and_samples(finished: tuple[Path, dict[str, Any]]) -> None:
    out, result = finished
    page = (out / "report.html").read_text()
    for row in result["rows"]:
        assert shown(row["perplexity"]) in page
    assert "the king" in page
    assert "<script" not in page


def test_the_saved_configuration_gives_the_same_adapter_again(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out, result = finished
    again = finetune(
        Config.read(commands.FINETUNE, {"out": str(tmp_path / "again")}, out / "config.yaml"), console=False
    )
    assert adapter_hash(tmp_path / "again") == adapter_hash(out)
    assert [row["perplexity"] for row in again["rows"]] == [row["perplexity"] for row in result["rows"]]


def test_another_seed_gives_another_adapter(tune: Tune, finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    tune(tmp_path / "run", seed=1)
    assert adapter_hash(tmp_path / "run") != adapter_hash(finished[0])


def test_a_run_in_the_folder_of_an_existing_run_fails_and_changes_nothing(
    octavo: Octavo, finished: tuple[Path, dict[str, Any]], tiny_llama: Path, plays: Path
) -> None:
    out, _ = finished
    before = contents(out)
    done = octavo("finetune", "--model", tiny_llama, "--data", plays / "train", "--out", out)
    assert done.code == 2
    assert "--resume" in done.err
    assert contents(out) == before


@pytest.mark.parametrize("family", ["tiny_llama", "tiny_gptj"])
@pytest.mark.parametrize("more", [{}, EVERYTHING], ids=["linears", "everything"])
def test_the_adapter_loads_in_peft_and_gives_the_same_logits(
    tune: Tune, request: pytest.FixtureRequest, tmp_path: Path, family: str, more: dict[str, Any]
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = request.getfixturevalue(family)
    if more:
        more = {**more, "lora_targets": ["all-linear", "lm_head", "embed_tokens" if family == "tiny_llama" else "wte"]}
    result = tune(tmp_path / "run", model=str(base), scheme="none", **more)
    assert result["rows"][1]["perplexity"] < 0.75 * result["rows"][0]["perplexity"]
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        untuned = plain(IDS).logits
        theirs = PeftModel.from_pretrained(plain, tmp_path / "run" / "adapter").eval()(IDS).logits
        ours = tuned_model(tmp_path / "run", base)(IDS)
    assert float((theirs - untuned).abs().max()) > 0.05
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("scheme", ["none", "int8", "dynamic8", "nf4", "nf4-double"])
def test_every_scheme_trains(tune: Tune, tmp_path: Path, scheme: str) -> None:
    base, tuned = tune(tmp_path / "run", scheme=scheme)["rows"]
    assert base["scheme"] == tuned["scheme"] == scheme
    assert tuned["perplexity"] < 0.75 * base["perplexity"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_trains_on_a_cpu(tune: Tune, tmp_path: Path, dtype: str) -> None:
    base, tuned = tune(tmp_path / "run", dtype=dtype)["rows"]
    assert tuned["perplexity"] < 0.75 * base["perplexity"]


def test_norms_and_biases_are_trained_saved_and_read_back(tune: Tune, tiny_llama: Path, tmp_path: Path) -> None:
    tune(tmp_path / "run", scheme="none", **EVERYTHING)
    saved = peft.read(tmp_path / "run" / "adapter")
    kinds = {key.rpartition(".")[2] for key in saved.full}
    assert kinds == {"weight", "bias"}
    base = FolderSource(tiny_llama)
    assert all(not torch.equal(saved.full[key], base.tensor(key)) for key in saved.full if "norm" in key)


@pytest.mark.parametrize("keep", ["best", "last"])
def test_the_kept_adapter_is_the_best_on_held_out_text_or_the_last(tune: Tune, tmp_path: Path, keep: str) -> None:
    """Training on the plays raises the loss on this held-out text, which is different from them."""
    (held_out := tmp_path / "held_out.txt").write_text("0123456789 ZYXWVU " * 9)
    result = tune(tmp_path / "run", keep=keep, test_data=[str(held_out)], eval_every=1, steps=8)
    losses = {event["step"]: event["loss"] for event in events(tmp_path / "run", "heldout")}
    best = min(losses, key=lambda step: losses[step])
    assert best != 8, "otherwise the test is not meaningful"
    expected_step = best if keep == "best" else 8
    assert result["best_step"] == (best if keep == "best" else None)
    assert json.loads((tmp_path / "run" / "adapter" / "octavo.json").read_text())["step"] == expected_step
    said = [event["text"] for event in events(tmp_path / "run", "say")]
    sentence = f"The adapter is that of step {best} of 8: the best on the held-out text."
    assert said[-2:].count(sentence) == (keep == "best"), "just before the paths"
    tuned = result["rows"][-1]["perplexity"]
    assert tuned == pytest.approx(torch.tensor(losses[expected_step]).double().exp().item(), rel=1e-5)


def test_without_held_out_text_there_is_a_warning_and_the_last_adapter_is_kept(
    tune: Tune, plays: Path, tmp_path: Path
) -> None:
    data = [str(plays / "train" / "play0.txt")]
    result = tune(tmp_path / "run", data=data, test_data=[], test_fraction=0, steps=2)
    assert (result["rows"], result["best_step"]) == ([], None)
    assert Path(result["adapter"], "adapter_config.json").is_file()
    assert any("no held-out text" in event["text"] for event in events(tmp_path / "run", "warn"))


def test_without_test_data_a_fraction_of_the_documents_is_held_out(tune: Tune, tmp_path: Path) -> None:
    result = tune(tmp_path / "run", test_data=[], test_fraction=0.3, steps=1)
    ledger = json.loads((tmp_path / "run" / "ledger.json").read_text())
    train, test = ({file["source"] for file in ledger[side]["files"]} for side in ("train", "test"))
    assert train.isdisjoint(test)
    assert len(train | test) == 6
    assert result["rows"]


def test_epochs_count_passes_over_the_data(tune: Tune, tmp_path: Path) -> None:
    result = tune(tmp_path / "run", steps=None, epochs=1.5, batch_size=8)
    rows = json.loads((tmp_path / "run" / "ledger.json").read_text())["train"]["rows"]
    assert result["steps"] == math.ceil(math.ceil(rows / 8) * 1.5)


BAD = {
    "binary.txt": bytes(range(256)) * 4,
    "latin.txt": "Größe".encode("latin-1") * 9,
    "empty.txt": b"",
    "cut.jsonl": b'{"text": "the king"}\n{"text": "the que',
    "cut.txt.gz": gzip.compress(b"the king of york\n" * 99)[:40],
    "cut.parquet": b"PAR1 and no more",
}


@pytest.mark.parametrize("name", BAD)
def test_the_error_for_a_bad_file_names_it_and_leaves_no_run(
    octavo: Octavo, settings: Settings, tmp_path: Path, name: str
) -> None:
    (bad := tmp_path / name).write_bytes(BAD[name])
    (good := tmp_path / "good.txt").write_text("where is my lord the duke of york\n" * 20)
    (file := tmp_path / "settings.yaml").write_text(settings(tmp_path / "run", data=[], steps=1).to_yaml())
    command = ("finetune", "--config", file, "--data", good, "--json")
    failed = octavo(*command, "--data", bad)
    assert (failed.code, failed.json["error"]["type"]) == (1, "DataError")
    assert str(bad) in failed.err
    assert "Traceback" not in failed.err
    assert set(contents(tmp_path / "run")) == set()
    skipping = octavo(*command, "--data", bad, "--skip-bad")
    assert skipping.code == 0, "the same folder is usable after the error"
    ledger = json.loads((tmp_path / "run" / "ledger.json").read_text())["train"]
    assert ledger["skipped"] >= 1
    assert {file["source"]: file["skipped"] > 0 for file in ledger["files"]} == {str(good): False, str(bad): True}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"lora_targets": ["q_porj"]}, UsageError, "--lora-targets.*'q_porj'.*\n.*q_proj"),
        ({"seq_len": 129}, UsageError, "--seq-len 128"),
        ({"data": ["absent"]}, UsageError, "absent"),
        ({"test_data": ["absent"]}, UsageError, "absent"),
        ({"model": "absent"}, UsageError, "absent"),
    ],
)
def test_an_invalid_setting_is_reported_and_leaves_no_run(
    tune: Tune, tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        tune(tmp_path / "run", **changes)
    assert contents(tmp_path / "run") == {}


@pytest.mark.parametrize("changes", [{"lora_targets": ["foo"]}, {"seq_len": 129}], ids=str)
def test_settings_that_do_not_fit_the_model_are_reported_before_text_is_read(
    tune: Tune, tmp_path: Path, changes: dict[str, Any]
) -> None:
    with pytest.raises(UsageError, match=r"--(lora-targets|seq-len)"):
        tune(tmp_path / "run", data=["absent"], **changes)


def test_data_without_targets_are_a_usage_error(tune: Tune, tmp_path: Path) -> None:
    record = {"prompt": "q" * 99, "completion": "king"}
    (path := tmp_path / "long.jsonl").write_text(json.dumps(record) + "\n")
    with pytest.raises(UsageError, match="no token to train on"):
        tune(tmp_path / "run", data=[str(path)], truncate=True)


def test_held_out_rows_without_targets_are_skipped(tune: Tune, tmp_path: Path) -> None:
    lines = [{"prompt": "q" * 99, "completion": "king"}, {"prompt": "my ", "completion": "lord"}]
    (path := tmp_path / "held_out.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = tune(tmp_path / "run", test_data=[str(path)], truncate=True, eval_rows=1, steps=1)
    assert result["rows"][0]["tokens"] > 0


def test_a_loss_that_is_not_finite_stops_the_run_with_step_and_files(
    octavo: Octavo, settings: Settings, tmp_path: Path
) -> None:
    config = settings(tmp_path / "run", lr=1e30, max_grad_norm=0, warmup=0, keep="last", eval_every=9)
    (file := tmp_path / "settings.yaml").write_text(config.to_yaml())
    done = octavo("finetune", "--config", file, "--json")
    assert (done.code, done.json["error"]["type"]) == (1, "TrainingError")
    assert "The loss is nan at step 2" in done.err
    assert "play" in done.err.partition("at step 2")[2]
    assert "--lr" in done.err


def test_an_adapter_that_differs_after_reading_back_is_an_error(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = peft.read

    def damaged(folder: Path) -> peft.Adapter:
        read = original(folder)
        lora = {name: (a, b * 1.5, scaling) for name, (a, b, scaling) in read.lora.items()}
        return peft.Adapter(read.spec, lora, read.full, read.origin)

    monkeypatch.setattr(peft, "read", damaged)
    with pytest.raises(AdapterError, match="other logits"):
        finetune(settings(tmp_path / "run"), console=False)


def test_a_run_without_gradients_fails_at_its_first_step(
    tune: Tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Simulates a layer that stops the gradient."""
    original = adapters.trained

    def with_a_dead_one(model: Decoder) -> dict[str, torch.nn.Parameter]:
        named = original(model)
        device = next(iter(named.values())).device  # the run is planned on the meta device first
        return {**named, "nowhere.lora_A": torch.nn.Parameter(torch.ones(2, 2, device=device))}

    monkeypatch.setattr(adapters, "trained", with_a_dead_one)
    with pytest.raises(TrainingError, match="No gradient reaches nowhere"):
        tune(tmp_path / "run")


def test_the_saved_settings_exclude_options_of_one_call(
    finished: tuple[Path, dict[str, Any]], tune: Tune, tmp_path: Path
) -> None:
    tune(tmp_path / "run", stop_after=1)
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (saved["stop_after"], saved["resume"], saved["force"]) == (None, False, False)
    assert saved["rank"] == 2
