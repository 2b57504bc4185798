"""One call or several: the same adapter and the same metrics, bit for bit, however a call ended."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from datetime import date
from importlib import import_module
from pathlib import Path
from typing import Any, Self

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tests.forks import Forks

import octavo as octavo_api
from octavo.adapters import trained
from octavo.commands.finetune.prepare import _with_micro_batch_size
from octavo.config import Config, ServeOptions, TrainOptions
from octavo.config.commands import LAST_SETTING, SERVE
from octavo.errors import CheckpointError, TrainingError
from octavo.reporting import Report
from octavo.server.serve import adapter_folders, open_engine
from octavo.store import peft
from octavo.store.files import lock

Octavo = Callable[..., Any]
Settings = Callable[..., Config]
Tune = Callable[..., dict[str, Any]]

# Seven micro-batches make an epoch and three a step: each epoch's edge lies within a step.
LONG = {
    "steps": 8,
    "batch_size": 12,
    "micro_batch_size": 4,
    "dropout": 0.2,
    "checkpoint_every": 2,
    "eval_every": 3,
    "scheme": "int8",
}
COMPARED = ("step", "loss", "learning_rate", "grad_norm", "tokens", "trained_tokens")


def events(folder: Path, name: str) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == name]


def outcome(folder: Path) -> dict[str, Any]:
    """All results of a run that must not depend on the number of calls."""
    return {
        "adapter": (folder / "adapter" / "adapter_model.safetensors").read_bytes(),
        "steps": [{key: event[key] for key in COMPARED} for event in events(folder, "step")],
        "heldout": [(event["step"], event["loss"]) for event in events(folder, "heldout")],
        "tables": [
            {key: value for key, value in row.items() if key != "adapter"}
            for row in events(folder, "evaluation")[-1]["rows"]
        ],
    }


def saved_steps(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (folder / "checkpoints").glob("step-*"))


def after_step(monkeypatch: pytest.MonkeyPatch, number: int, act: Callable[[], None]) -> None:
    """Calls `act` once, after the metrics of step `number` are recorded and before its checkpoint is saved."""
    record, once = Report.event, [act]

    def event(self: Report, name: str, /, **fields: object) -> None:
        record(self, name, **fields)
        if name == "step" and fields["step"] == number and once:
            once.pop()()

    monkeypatch.setattr(Report, "event", event)


@pytest.fixture(scope="module")
def uninterrupted(tune: Tune, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The long run without a stop, in a folder for copies, and its document."""
    out = tmp_path_factory.mktemp("whole") / "run"
    return out, tune(out, **LONG)


@pytest.fixture(scope="module")
def in_one_go(uninterrupted: tuple[Path, dict[str, Any]]) -> dict[str, Any]:
    """The outcome of the long run without a stop."""
    return outcome(uninterrupted[0])


@pytest.fixture(scope="module")
def stopped(tune: Tune, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The long run, stopped after step 4, with checkpoints of steps 3 (a best one) and 4. To be copied."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    answer = tune(out, **LONG, stop_after=4)
    assert (answer["steps"], answer["adapter"]) == (4, None)
    assert saved_steps(out) == [3, 4]
    return out


@pytest.fixture
def halfway(stopped: Path, tmp_path: Path) -> Path:
    """A copy of the stopped run."""
    return Path(shutil.copytree(stopped, tmp_path / "run"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def files_of(folder: Path) -> dict[Path, bytes]:
    """All files except the metrics, to which each call appends, and the lock."""
    left_out = ("metrics.jsonl", ".lock")
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name not in left_out}


def test_the_long_run_crosses_epochs_within_a_step_and_uses_dropout(
    tune: Tune, in_one_go: dict[str, Any], tmp_path: Path
) -> None:
    """The precondition of the tests below."""
    tune(tmp_path / "run", **{**LONG, "dropout": 0.0})
    assert outcome(tmp_path / "run")["steps"][1:] != in_one_go["steps"][1:]
    rows = json.loads((tmp_path / "run" / "ledger.json").read_text())["train"]["rows"]
    assert -(-rows // 4) == 7


@pytest.mark.parametrize("stops", [pytest.param((2,), marks=pytest.mark.exhaustive), (3,), (1, 4), (7,)])
def test_calls_that_stop_and_resume_give_what_one_call_gives(
    tune: Tune, in_one_go: dict[str, Any], tmp_path: Path, stops: tuple[int, ...]
) -> None:
    """The stops include the step in which the first epoch ends, and the step before the last."""
    out = tmp_path / "run"
    for number, steps in enumerate(stops):
        tune(out, **LONG, stop_after=steps, resume=number > 0)
    tune(out, **LONG, resume=True)
    assert outcome(out) == in_one_go


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_all_trained_parameters_resume_bit_for_bit(tune: Tune, tmp_path: Path, optimizer: str) -> None:
    more = {
        **LONG,
        "steps": 4,
        "rank": 8,  # bitsandbytes keeps the state of fewer than 4096 numbers in 32 bits
        "optimizer": optimizer,
        "weight_decay": 0.1,
        "lora_targets": ["all-linear", "embed_tokens", "lm_head"],
        "train_norms": True,
        "train_biases": True,
        "rslora": True,
        "dtype": "float16",
        "scheme": "none",
    }
    tune(tmp_path / "whole", **more)
    tune(tmp_path / "parts", **more, stop_after=2)
    tune(tmp_path / "parts", **more, resume=True)
    assert outcome(tmp_path / "parts") == outcome(tmp_path / "whole")
    state = load_file(tmp_path / "parts" / "checkpoints" / "step-00000004" / "optimizer.safetensors")
    assert any(tensor.dtype == torch.uint8 for tensor in state.values()) == (optimizer == "adamw8bit")


def test_a_checkpoint_has_the_adapter_folders_of_the_run(tune: Tune, tmp_path: Path) -> None:
    """The best adapter of a run and those of its checkpoints are the same files, but for the results in its README."""
    run = tmp_path / "run"
    tune(run, **LONG, keep_checkpoints=9)
    checkpoints = {step: run / "checkpoints" / f"step-{step:08d}" for step in saved_steps(run)}
    best = json.loads((run / "adapter" / "octavo.json").read_text())["step"]
    kept, saved = contents(run / "adapter"), contents(checkpoints[best] / "adapter")
    assert kept.pop("README.md") != saved.pop("README.md")
    assert kept == saved
    assert contents(checkpoints[4] / "best") == contents(checkpoints[3] / "adapter") != contents(run / "adapter")
    assert contents(checkpoints[4] / "adapter").keys() == contents(run / "adapter").keys()
    assert not (checkpoints[3] / "best").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_after_a_signal_the_step_is_finished_and_saved_and_the_exit_code_is_the_signals(
    octavo: Octavo,
    settings: Settings,
    in_one_go: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
) -> None:
    before = signal.getsignal(number)
    after_step(monkeypatch, 5, lambda: os.kill(os.getpid(), number))
    (file := tmp_path / "settings.yaml").write_text(settings(tmp_path / "run", **LONG).to_yaml())
    done = octavo("finetune", "--config", file, "--json")
    assert (done.code, done.json["error"]["exit_code"]) == (128 + number, 128 + number)
    assert f"octavo finetune --resume --out {tmp_path / 'run'}" in done.err
    assert saved_steps(tmp_path / "run")[-1] == 5
    assert signal.getsignal(number) == before
    assert octavo("finetune", "--resume", "--out", tmp_path / "run").code == 0, "the advice alone is enough"
    assert outcome(tmp_path / "run") == in_one_go


def test_a_second_signal_does_not_wait(
    settings: Settings, tune: Tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt_twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    after_step(monkeypatch, 2, interrupt_twice)
    with pytest.raises(KeyboardInterrupt):
        tune(tmp_path / "run", **LONG)


def test_a_killed_run_resumes_from_its_newest_checkpoint(
    octavo: Octavo, settings: Settings, in_one_go: dict[str, Any], tmp_path: Path, forks: Forks
) -> None:
    """kill -9 after step 7 was recorded: its metrics are removed, so that each step is recorded once."""
    (file := tmp_path / "settings.yaml").write_text(settings(tmp_path / "run", **LONG).to_yaml())
    code = (
        "import os, signal\nfrom octavo.reporting import Report\nrecord = Report.event\n"
        "def event(self, name, /, **fields):\n"
        "    record(self, name, **fields)\n"
        "    if name == 'step' and fields['step'] == 7:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "Report.event = event\nfrom octavo.cli import main\nmain()"
    )
    process = forks.run(code, "finetune", "--config", file)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert events(tmp_path / "run", "step")[-1]["step"] == 7
    assert saved_steps(tmp_path / "run")[-1] == 6
    assert octavo("finetune", "--resume", "--out", tmp_path / "run").code == 0
    assert outcome(tmp_path / "run") == in_one_go


def test_a_crash_between_the_best_adapter_and_its_checkpoint_loses_nothing(
    tune: Tune, in_one_go: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The adapter folder is then newer than the newest checkpoint."""

    def crash(*_: object, **__: object) -> None:
        raise RuntimeError("no power")

    with monkeypatch.context() as patch:
        after_step(patch, 6, lambda: patch.setattr("octavo.commands.finetune.save_checkpoint", crash))
        with pytest.raises(RuntimeError, match="no power"):
            tune(tmp_path / "run", **LONG)
    assert json.loads((tmp_path / "run" / "adapter" / "octavo.json").read_text())["step"] == 6
    assert saved_steps(tmp_path / "run")[-1] == 4
    tune(tmp_path / "run", **LONG, resume=True)
    assert outcome(tmp_path / "run") == in_one_go


def test_a_damaged_newest_checkpoint_is_skipped(tune: Tune, halfway: Path, in_one_go: dict[str, Any]) -> None:
    file = halfway / "checkpoints" / "step-00000004" / "adapter" / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    tune(halfway, **LONG, resume=True)
    assert any("damaged" in event["text"] for event in events(halfway, "warn"))
    assert outcome(halfway) == in_one_go


@pytest.mark.parametrize("resumes", [1, 2])
def test_resuming_a_finished_run_gives_the_same_table_and_changes_nothing(
    tune: Tune, uninterrupted: tuple[Path, dict[str, Any]], in_one_go: dict[str, Any], tmp_path: Path, resumes: int
) -> None:
    run, first = shutil.copytree(uninterrupted[0], tmp_path / "run"), uninterrupted[1]
    for _ in range(resumes):
        again = tune(run, **LONG, resume=True)
    assert json.loads(json.dumps(again["rows"]).replace(str(run), str(uninterrupted[0]))) == first["rows"]
    assert (again["steps"], again["best_step"]) == (first["steps"], first["best_step"])
    assert again["differences"] == first["differences"]
    assert outcome(run) == in_one_go
    complete = [event for event in events(run, "say") if "The run is complete: all 8 steps are done" in event["text"]]
    assert complete
    assert not any("is complete" in event["text"] for event in events(uninterrupted[0], "say"))


def test_resuming_a_finished_run_returns_its_last_loss(tune: Tune, tmp_path: Path) -> None:
    first = tune(tmp_path / "run")
    assert first["train_loss"] is not None
    assert tune(tmp_path / "run", resume=True)["train_loss"] == first["train_loss"]


def test_a_finished_run_can_be_made_longer(tune: Tune, tmp_path: Path) -> None:
    short = {**LONG, "steps": 4, "schedule": "constant", "warmup": 0}
    tune(tmp_path / "run", **short)
    tune(tmp_path / "run", **{**short, "steps": 8}, resume=True)
    tune(tmp_path / "whole", **{**short, "steps": 8})
    assert outcome(tmp_path / "run")["steps"] == outcome(tmp_path / "whole")["steps"]
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["steps"] == 8


def test_resume_without_a_checkpoint_starts_from_the_beginning_with_a_warning(
    tune: Tune, in_one_go: dict[str, Any], tmp_path: Path
) -> None:
    tune(tmp_path / "run", **LONG, resume=True)
    assert any("no checkpoint" in event["text"] for event in events(tmp_path / "run", "warn"))
    assert outcome(tmp_path / "run") == in_one_go


def other_settings(tiny_gptj: Path, plays: Path, tmp_path: Path) -> dict[str, dict[str, Any]]:
    (held_out := tmp_path / "held.txt").write_text("where is my lord of york\n" * 9)
    return {
        "rank": {"rank": 4},
        "lora_targets": {"lora_targets": ["q_proj"]},
        "dropout": {"dropout": 0.0},
        "batch_size": {"batch_size": 2},
        "seed": {"seed": 1},
        "scheme": {"scheme": "none"},
        "dtype": {"dtype": "bfloat16"},
        "data": {"data": [str(plays / "train" / "play0.txt")]},
        "test_data": {"test_data": [str(held_out)]},
        "model": {"model": str(tiny_gptj)},
    }


@pytest.mark.parametrize(
    "key", ["rank", "lora_targets", "dropout", "batch_size", "seed", "scheme", "dtype", "data", "test_data", "model"]
)
def test_a_run_with_other_settings_is_not_resumed_and_nothing_is_changed(
    tune: Tune, halfway: Path, tiny_gptj: Path, plays: Path, tmp_path: Path, key: str
) -> None:
    before = files_of(halfway)
    with pytest.raises(CheckpointError, match=rf"(?m)^  {key}: "):
        tune(halfway, **{**LONG, **other_settings(tiny_gptj, plays, tmp_path)[key]}, resume=True)
    assert files_of(halfway) == before
    assert len(before) > 9


def test_a_run_resumes_after_other_settings_were_refused(tune: Tune, halfway: Path, in_one_go: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError):
        tune(halfway, **{**LONG, "seed": 1}, resume=True)
    tune(halfway, **LONG, resume=True)
    assert outcome(halfway) == in_one_go


def test_force_resumes_with_other_settings_if_the_shapes_fit(tune: Tune, halfway: Path) -> None:
    answer = tune(halfway, **{**LONG, "dropout": 0.0}, resume=True, force=True)
    assert answer["steps"] == 8
    assert any("dropout" in event["text"] for event in events(halfway, "warn"))


@pytest.mark.parametrize(("before", "now", "scale"), [("float16", "float32", 1.0), ("float32", "float16", 2.0**13)])
def test_force_with_another_dtype_begins_with_the_loss_scale_of_that_dtype(
    tune: Tune, tmp_path: Path, before: str, now: str, scale: float
) -> None:
    """A scale that nothing divides by again would be a factor of all gradients."""
    tune(tmp_path / "run", steps=2, stop_after=1, checkpoint_every=1, dtype=before)
    tune(tmp_path / "run", steps=2, checkpoint_every=1, dtype=now, resume=True, force=True)
    saved = json.loads((tmp_path / "run" / "checkpoints" / "step-00000002" / "state.json").read_text())
    assert saved["scaler"]["scale"] == scale
    norms = [event["grad_norm"] for event in events(tmp_path / "run", "step")]
    assert norms[1] < 100 * norms[0]


def test_force_cannot_make_another_shape_fit(tune: Tune, halfway: Path) -> None:
    with pytest.raises(CheckpointError, match="of shape"):
        tune(halfway, **{**LONG, "rank": 4}, resume=True, force=True)


def test_keeping_the_last_adapter_can_be_chosen_on_resuming(tune: Tune, halfway: Path) -> None:
    tune(halfway, **LONG, resume=True, keep="last")
    assert json.loads((halfway / "adapter" / "octavo.json").read_text())["step"] == 8


def test_stop_after_applies_to_one_call_only(octavo: Octavo, tune: Tune, tmp_path: Path) -> None:
    tune(tmp_path / "run", **LONG, stop_after=3)
    done = octavo("finetune", "--resume", "--out", tmp_path / "run", "--json")
    assert (done.code, done.json["steps"]) == (0, 8)


def test_a_run_without_a_name_is_resumed_without_one(
    octavo: Octavo, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = settings(Path("runs/finetune"), stop_after=1, steps=2).to_yaml()
    (file := tmp_path / "settings.yaml").write_text(text)
    assert octavo("finetune", "--config", file).code == 0
    done = octavo("finetune", "--resume", "--json")
    assert (done.code, done.json["steps"]) == (0, 2)


@pytest.mark.parametrize("share", [0.0, 0.7])
def test_truncated_settings_are_reported(octavo: Octavo, halfway: Path, share: float) -> None:
    settings = halfway / "config.yaml"
    settings.write_text(settings.read_text()[: int(share * settings.stat().st_size)].rpartition("\n")[0])
    done = octavo("finetune", "--resume", "--out", halfway)
    assert done.code == 2
    assert f"{settings} is cut short" in done.err


def test_the_last_key_of_the_settings_is_the_one_that_marks_a_whole_file(stopped: Path) -> None:
    """Runs of earlier versions end with it: new options go before it."""
    assert list(yaml.safe_load((stopped / "config.yaml").read_text()))[-1] == LAST_SETTING


def test_a_run_of_another_process_is_not_changed(tune: Tune, halfway: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (halfway / "metrics.jsonl").read_bytes()
    with lock(halfway), pytest.raises(CheckpointError, match="another process"):
        tune(halfway, **LONG, resume=True)
    assert (halfway / "metrics.jsonl").read_bytes() == before


def test_a_stop_before_the_end_is_an_error_with_the_command_to_resume(
    tune: Tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    after_step(monkeypatch, 1, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(TrainingError) as caught:
        tune(tmp_path / "a folder", **LONG)
    assert caught.value.hint.endswith(f"--out '{tmp_path / 'a folder'}'")


def test_a_run_whose_template_has_the_date_resumes_on_another_day(
    octavo: Octavo, tune: Tune, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    (model / "chat_template.jinja").write_text(
        "{{ strftime_now('%d %b %Y') }}\n{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    )
    turns = [{"role": "user", "content": "where is my lord"}, {"role": "assistant", "content": "the king of york"}]
    (tmp_path / "talks.jsonl").write_text(f"{json.dumps({'messages': turns})}\n" * 8)

    class Yesterday(date):
        @classmethod
        def today(cls) -> Self:
            return cls(2024, 2, 29)

    with monkeypatch.context() as patch:
        patch.setattr(import_module("octavo.commands.finetune.prepare"), "date", Yesterday)
        talks = {"model": str(model), "data": [str(tmp_path / "talks.jsonl")], "test_fraction": 0.0, "test_data": []}
        tune(tmp_path / "run", **talks, steps=2, stop_after=1)
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["template_date"] == "2024-02-29"
    done = octavo("finetune", "--resume", "--out", tmp_path / "run", "--json")
    assert (done.code, done.json["steps"]) == (0, 2)


def adapters_of(run: Path) -> dict[str, Path]:
    """What --adapter can name in the stopped run, and the folder that it stands for."""
    checkpoints = run / "checkpoints"
    return {
        f"{run}": run / "adapter",
        f"{run}@3": checkpoints / "step-00000003" / "adapter",
        f"{run}@4": checkpoints / "step-00000004" / "adapter",
    }


def test_every_command_takes_a_run_and_its_steps(octavo: Octavo, tiny_llama: Path, plays: Path, stopped: Path) -> None:
    model = ("--model", tiny_llama, "--scheme", "none", "--dtype", "float32")
    rows: dict[str, Any] = {}
    texts: dict[str, Any] = {}
    for name, folder in adapters_of(stopped).items():
        for adapter in (name, folder):
            done = octavo("evaluate", *model, "--adapter", adapter, "--json", "--seq-len", 32, plays / "test")
            assert done.code == 0, done.err
            (tuned,) = (row for row in done.json["rows"] if row["name"] == "tuned")
            assert rows.setdefault(name, tuned) == tuned
            assert tuned["adapter"] == str(folder)
            ask = ("--prompt", "the king", "--max-new-tokens", 8, "--temperature", 0, "--json")
            text = octavo("generate", *model, "--adapter", adapter, *ask).json["token_ids"]
            assert texts.setdefault(name, text) == text
    assert rows[f"{stopped}@3"]["perplexity"] == rows[str(stopped)]["perplexity"] != rows[f"{stopped}@4"]["perplexity"]
    done = octavo("generate", *model, "--adapter", f"{stopped}@2", "--prompt", "the")
    assert (done.code, "The run has checkpoints of the steps 3, 4." in done.err) == (1, True)


def test_the_python_api_and_the_server_take_a_step_of_a_run(tiny_llama: Path, stopped: Path) -> None:
    named = adapters_of(stopped)
    options = {"model": str(tiny_llama), "scheme": "none", "dtype": "float32", "device": "cpu"}
    for name, folder in named.items():
        expected = trained(octavo_api.load(adapter=folder, quiet=True, **options).decoder)
        parameters = trained(octavo_api.load(adapter=name, quiet=True, **options).decoder)
        assert all(torch.equal(parameters[key], expected[key]) for key in expected)
    served = {f"a{number}": name for number, name in enumerate(named)}
    config = Config.read(SERVE, {**options, "adapter": [f"{key}={name}" for key, name in served.items()]}, shown=str)
    with Report(console=False) as report:
        engine = open_engine(config, report, adapters=adapter_folders(config[ServeOptions]))
    assert {key: adapter.sha256 for key, adapter in engine.adapters().items()} == {
        key: peft.read(named[name]).sha256 for key, name in served.items()
    }


def test_resuming_with_another_micro_batch_size_is_a_warning(tune: Tune, tmp_path: Path) -> None:
    """Without dropout the losses stay the same up to rounding; the bits do not."""
    options = {**LONG, "dropout": 0.0, "steps": 4}
    tune(tmp_path / "run", **options, stop_after=2)
    tune(tmp_path / "run", **{**options, "micro_batch_size": 6}, resume=True)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    texts = [event["text"] for event in map(json.loads, lines) if event["event"] == "warn"]
    assert any("--micro-batch-size 4 is now 6" in text for text in texts), texts


@pytest.mark.parametrize(("dropout", "effect"), [(0.0, "equal up to rounding"), (0.2, "dropout masks change")])
def test_the_warning_for_another_micro_batch_size_says_what_changes(
    settings: Settings, tmp_path: Path, dropout: float, effect: str
) -> None:
    config = settings(tmp_path / "run", batch_size=8, micro_batch_size=4, dropout=dropout)
    with Report(console=False, metrics=tmp_path / "said") as report:
        changed = _with_micro_batch_size(config, 2, 20, report)
    assert changed[TrainOptions].micro_batch_size == 2
    assert effect in (tmp_path / "said").read_text()


def test_each_call_says_once_that_a_step_has_fewer_sequences(tune: Tune, tmp_path: Path) -> None:
    options: dict[str, Any] = {"batch_size": 20_000, "micro_batch_size": 10_000, "steps": 2, "checkpoint_every": 1}
    tune(tmp_path / "run", **options, stop_after=1)
    tune(tmp_path / "run", **options, resume=True)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    texts = [event["text"] for event in map(json.loads, lines) if event["event"] in ("say", "warn")]
    assert sum("--micro-batch-size 10,000 is used as" in text for text in texts) == 2, texts
    assert not any("fit into memory" in text for text in texts)
