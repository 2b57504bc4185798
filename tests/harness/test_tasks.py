"""harness/tasks.py: `octavo evaluate --tasks`; one text scored by octavo, by lm-eval, and by lm-eval over HTTP."""

from __future__ import annotations

import json
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import lm_eval.tasks
import numpy as np
import pytest
import torch
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.tasks import TaskManager
from tests.forks import Forks, Process
from tests.harness.conftest import Write, open_lm
from transformers import AutoModelForCausalLM

from octavo import metrics as measure
from octavo.config import EvaluateOptions
from octavo.data.packing import pack
from octavo.data.tokens import Tokens
from octavo.errors import UsageError
from octavo.harness import tasks
from octavo.reporting import Report
from octavo.store.builtin import open_smollm2

Octavo = Callable[..., Any]

ROLLING = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
    "metric_list": [{"metric": "bits_per_byte"}, {"metric": "word_perplexity"}],
}
CHOICE = {
    "output_type": "multiple_choice",
    "fewshot_split": "test",
    "doc_to_text": "{{begin}}",
    "doc_to_choice": "{{ends}}",
    "doc_to_target": "{{right}}",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}, {"metric": "brier_score"}],
}
WRITE = {
    "output_type": "generate_until",
    "doc_to_text": "{{begin}}",
    "doc_to_target": "{{ends[right]}}",
    "generation_kwargs": {"until": ["\n", "."], "max_gen_toks": 12, "do_sample": False},
    "metric_list": [{"metric": "chrf"}],
}
SPEECHES = [
    {"text": "To be, or not to be, that is the question:\nWhether 'tis nobler in the mind to suffer\n"},
    {"text": "Alas, poor Yorick! I knew him, Horatio: a fellow of infinite jest, of most excellent fancy… été."},
]
QUESTIONS = [
    {"begin": "The capital of France is", "ends": [" Paris", " a horse", " Rome"], "right": 0},
    {"begin": "To be, or not to be, that is the", "ends": [" fish", " question", " answer"], "right": 1},
    {"begin": "The king of Denmark said:", "ends": [" my lord", " where", " duke york"], "right": 2},
]


def options(folder: Path, names: str, **more: Any) -> EvaluateOptions:
    return EvaluateOptions.model_validate({"tasks": names, "include_path": folder, **more})


def by_metric(rows: list[dict[str, Any]]) -> dict[str, float]:
    return {f"{row['task']} {row['metric']}": row["value"] for row in rows}


def with_lm_eval(model: Any, folder: Path, *names: str) -> dict[str, float]:
    """The metrics that lm-eval computes for one of its model classes."""
    loaded = TaskManager(include_path=str(folder), include_defaults=False).load(list(names))
    for task in loaded["tasks"].values():
        task.set_config(key="num_fewshot", value=0)
    actual = evaluate(model, loaded, log_samples=False, bootstrap_iters=0)
    return {
        f"{task} {key.partition(',')[0]}": value
        for task, metrics in actual["results"].items()
        for key, value in metrics.items()
        if "," in key and "_stderr" not in key
    }


# One real model: octavo, lm-eval, and lm-eval over HTTP.


@pytest.fixture(scope="module")
def smollm2(smollm2_cache: Path) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OCTAVO_CACHE", str(smollm2_cache))
        yield open_smollm2().folder


@pytest.fixture
def server(smollm2: Path, forks: Forks) -> Iterator[Process]:
    """A starting server of the unquantized model in float32: it prints a line when it listens."""
    process = forks.octavo(
        "serve",
        "--model",
        smollm2,
        "--port",
        0,
        "--scheme",
        "none",
        "--dtype",
        "float32",
        "--max-model-len",
        512,
        "--json",
    )
    yield process
    process.send_signal(signal.SIGTERM)
    process.communicate()
    process.close()


@pytest.mark.exhaustive
def test_octavo_lm_eval_and_lm_eval_over_http_agree(smollm2: Path, server: Process, write_task: Write) -> None:
    """Bits per byte agree to four digits, and all other metrics with them."""
    write_task("speech", SPEECHES, **ROLLING)
    write_task("choose", QUESTIONS, **CHOICE)
    folder = write_task("write", QUESTIONS, **WRITE)
    names = ("speech", "choose", "write")
    model = open_lm(smollm2)
    inside = with_lm_eval(model, folder, *names)
    line = server.stdout.readline()
    assert line, server.communicate()[1]
    client = LocalCompletionsAPI(
        base_url=f"{json.loads(line)['url']}/v1/completions", model=smollm2.name, tokenizer=str(smollm2),
        tokenizer_backend="huggingface", max_length=512, num_concurrent=2, max_retries=1,
    )  # fmt: skip
    over_http = with_lm_eval(client, folder, *names)
    assert inside.keys() == over_http.keys()
    assert len(inside) == 6
    assert list(inside.values()) == pytest.approx(list(over_http.values()), rel=1e-4)
    assert octavo_bits_per_byte(model) == pytest.approx(inside["speech bits_per_byte"], rel=1e-4)
    assert 1 < inside["speech bits_per_byte"] < 3


def octavo_bits_per_byte(model: Any) -> float:
    """Bits per byte by octavo's loss over packed rows, of the tokens that lm-eval counts.

    Those are the tokens of a text, predicted from the token that lm-eval puts before it. `octavo evaluate` counts the
    EOS token of a document too, and not its first token if the model has no BOS token.
    """
    texts = [speech["text"] for speech in SPEECHES]
    rows, _ = pack(
        [
            Tokens("", 0, np.array(ids, dtype=np.int32), np.arange(len(ids)) > 0, 0)
            for ids in ([model.prefix_token_id, *model.tokenizer(text)["input_ids"]] for text in texts)
        ],
        seq_len=64,
        pad_id=0,
    )
    n_bytes = sum(len(text.encode()) for text in texts)
    return measure.score(model.model, rows, n_bytes=n_bytes, batch_size=2).bits_per_byte


def test_with_a_bos_token_octavos_perplexity_is_that_of_lm_eval_plus_the_eos_token(
    beginning: Path, octavo: Octavo, write_task: Write
) -> None:
    text = "the king spoke to the queen of storm and sea"
    folder = write_task("speech", [{"text": text}], **ROLLING)
    (folder / "text.txt").write_text(text)
    done = octavo(
        "evaluate", folder / "text.txt", "--model", beginning, "--scheme", "none", "--dtype", "float32", "--tasks",
        "speech", "--include-path", folder, "--seq-len", 64, "--json",
    )  # fmt: skip
    [row] = done.json["rows"]
    expected = by_metric(done.json["tasks"])["speech bits_per_byte"]
    model = open_lm(beginning)
    ids = torch.tensor([model.tok_encode(text)])
    with torch.no_grad():
        end = -AutoModelForCausalLM.from_pretrained(beginning)(ids).logits[0, -1].log_softmax(0)[model.eot_token_id]
    bits = float(end) / np.log(2)
    assert row["bits_per_byte"] * len(text) == pytest.approx(expected * len(text) + bits, rel=1e-5)


# The command.


def test_tasks_run_on_every_model_of_the_table(
    octavo: Octavo, tiny_llama: Path, plays: Path, adapter_folder: Path, write_task: Write
) -> None:
    write_task("speech", SPEECHES, **ROLLING)
    write_task("choose", QUESTIONS, **CHOICE)
    folder = write_task("write", QUESTIONS, **WRITE)
    names = ("speech", "choose", "write")
    arguments = ("evaluate", "--model", tiny_llama, "--include-path", folder, "--dtype", "float32", "--seq-len", 32)
    three = (*arguments, "--tasks", ",".join(names), "--adapter", adapter_folder, "--json")
    done = octavo(*three, plays / "test")
    assert done.code == 0, done.err
    assert [row["name"] for row in done.json["rows"]] == ["base", "quantized base", "tuned"]
    actual = {
        name: by_metric([row for row in done.json["tasks"] if row["name"] == name])
        for name in ("base", "quantized base", "tuned")
    }
    assert {len(values) for values in actual.values()} == {6}
    bits = [values["speech bits_per_byte"] for values in actual.values()]
    assert 0 < abs(bits[0] - bits[1]) < 0.02 < abs(bits[2] - bits[1])
    alone = HFLM(pretrained=str(tiny_llama), device="cpu", dtype="float32")
    assert actual["base"] == pytest.approx(with_lm_eval(alone, folder, *names), rel=1e-5)
    assert actual["tuned"] == pytest.approx(by_metric(octavo(*three, "--compare", "int8").json["tasks"]), rel=1e-5)
    assert "word_perplexity" in done.err
    without = octavo(*arguments, "--tasks", "speech", "--limit", 1, "--no-base", "--json")
    assert without.json["rows"] == []
    assert {(row["name"], row["documents"]) for row in without.json["tasks"]} == {("quantized base", 1)}


def test_a_row_has_the_metric_of_lm_eval(octavo: Octavo, tiny_llama: Path, write_task: Write) -> None:
    folder = write_task("choose", QUESTIONS, **CHOICE)
    done = octavo(
        "evaluate", "--model", tiny_llama, "--scheme", "none", "--tasks", "choose", "--include-path", folder,
        "--fewshot", 1, "--json",
    )  # fmt: skip
    row = next(row for row in done.json["tasks"] if row["metric"] == "acc")
    assert {key: row[key] for key in row if key not in ("value", "stderr")} == {
        "name": "base", "scheme": "none", "adapter": None, "task": "choose", "metric": "acc", "filter": "none",
        "higher_is_better": True, "fewshot": 1, "documents": 3,
    }  # fmt: skip
    share = row["value"]
    assert share in [pytest.approx(n / 3) for n in range(4)]
    assert row["stderr"] == pytest.approx((share * (1 - share) / 2) ** 0.5)  # of a mean of three


def test_every_model_gets_the_same_examples(octavo: Octavo, tiny_llama: Path, write_task: Write) -> None:
    """Few-shot examples are sampled; models may differ only in their answers."""
    documents = [{**QUESTIONS[n % 3], "begin": f"Question {n}:"} for n in range(9)]
    folder = write_task("choose", documents, **CHOICE)
    done = octavo(
        "evaluate", "--model", tiny_llama, "--compare", "none,int8,none", "--tasks", "choose", "--include-path", folder,
        "--fewshot", 2, "--json", "--dtype", "float32",
    )  # fmt: skip
    base, quantized = (
        [row["value"] for row in done.json["tasks"] if row["scheme"] == scheme] for scheme in ("none", "int8")
    )
    assert quantized == pytest.approx(base, rel=0.01)
    assert quantized != base


def test_a_model_is_freed_before_the_next_one_is_loaded(
    octavo: Octavo, tiny_llama: Path, write_task: Write, loaded_models: list[Any]
) -> None:
    write_task("choose", QUESTIONS, **CHOICE)
    folder = write_task("write", QUESTIONS, **WRITE)
    options = ("--compare", "none,int8,nf4", "--tasks", "choose,write", "--include-path", folder)
    assert octavo("evaluate", "--model", tiny_llama, *options).code == 0
    assert len(loaded_models) == 3


def test_a_local_task_uses_no_network(
    tiny_llama: Path, write_task: Write, monkeypatch: pytest.MonkeyPatch, octavo: Octavo
) -> None:
    """Not even to count downloads of a file, where other programs may use the network."""
    requests: list[Any] = []

    def refuse(*arguments: Any, **_: Any) -> Any:
        requests.append(arguments)
        raise OSError("there is no network")

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", True)
    monkeypatch.setattr(datasets.load, "get_session", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    folder = write_task("speech", SPEECHES, **ROLLING)
    done = octavo("evaluate", "--model", tiny_llama, "--no-base", "--tasks", "speech", "--include-path", folder)
    assert (done.code, requests) == (0, [])


def test_output_of_a_tasks_code_is_not_in_the_json_document(
    octavo: Octavo, tiny_llama: Path, write_task: Write
) -> None:
    folder = write_task("speech", SPEECHES, **{**ROLLING, "doc_to_target": "REPLACED"})
    (folder / "task_code.py").write_text("def text(doc):\n    print('printed')\n    return doc['text']\n")
    config = folder / "speech.yaml"
    config.write_text(config.read_text().replace("REPLACED", "!function task_code.text"))
    options = ("--no-base", "--tasks", "speech", "--include-path", folder, "--json")
    done = octavo("evaluate", "--model", tiny_llama, *options)
    assert done.code == 0
    assert len(done.json["tasks"]) == 2
    assert "printed" in done.err


# Errors before a model is opened.


def refusal(requests: EvaluateOptions) -> UsageError:
    with pytest.raises(UsageError) as caught, Report(console=False) as report:
        tasks.load_tasks(requests, report)
    return caught.value


@pytest.fixture
def local_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hides the tasks of lm-eval, which take seconds to index."""
    manager = TaskManager
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda **given: manager(**{**given, "include_defaults": False}))


@pytest.mark.usefixtures("local_tasks")
def test_the_error_for_an_unknown_task_names_the_most_similar_one(write_task: Write) -> None:
    folder = write_task("speech", SPEECHES, **ROLLING)
    error = refusal(options(folder, "speech,speach"))
    assert "'speach'" in error.message
    assert "'speech'" in error.hint
    assert "lm-eval ls tasks" in error.hint


@pytest.mark.exhaustive
def test_tasks_of_lm_eval_and_of_a_folder_can_be_combined(write_task: Write) -> None:
    folder = write_task("speech", SPEECHES, **ROLLING)
    error = refusal(options(folder, "hellaswag,speech"))
    assert "hellaswag, speech cannot be prepared" in error.message
    assert "network" in error.hint


@pytest.mark.usefixtures("local_tasks")
def test_names_may_be_patterns_and_paths(write_task: Write) -> None:
    write_task("speech_1", SPEECHES, **ROLLING)
    folder = write_task("speech_2", SPEECHES, **ROLLING)
    with Report(console=False) as report:
        for given in ("speech_?", f"{folder / 'speech_1.yaml'},speech_2,speech_2"):
            loaded = tasks.load_tasks(options(folder, given), report)
            assert loaded is not None
            assert list(loaded.loaded["tasks"]) == ["speech_1", "speech_2"]


def test_the_error_for_a_task_that_cannot_be_prepared_has_the_reason(write_task: Write) -> None:
    write_task("speech", SPEECHES, **ROLLING)
    folder = write_task("choose", QUESTIONS, **CHOICE)
    assert "Sample larger" in refusal(options(folder, "choose", fewshot=9)).message
    (folder / "speech.jsonl").unlink()
    error = refusal(options(folder, "speech"))
    assert "speech.jsonl" in error.message
    assert "current folder" in error.hint


def test_a_task_that_executes_generated_code_is_an_error(write_task: Write) -> None:
    folder = write_task("code", QUESTIONS, **WRITE, unsafe_code=True)
    assert "sandbox" in refusal(options(folder, "code")).hint


def test_without_lm_eval_the_error_names_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "find_spec", lambda _: None)
    assert refusal(EvaluateOptions(tasks=["hellaswag"])).hint == "pip install 'octavo[eval]'"


def test_options_of_tasks_without_tasks_are_a_usage_error(octavo: Octavo, tmp_path: Path, tiny_llama: Path) -> None:
    for flags in (("--limit", 2), ("--fewshot", 0), ("--include-path", tmp_path)):
        done = octavo("evaluate", "--model", tiny_llama, "text.txt", *flags)
        assert done.code == 2
        assert "--tasks" in done.err
    assert "not a folder" in refusal(options(tmp_path / "nowhere", "speech")).message


def test_a_task_with_num_fewshot_0_gets_no_examples(write_task: Write, tmp_path: Path) -> None:
    folder = write_task("choose", QUESTIONS, **CHOICE, num_fewshot=0)
    with Report(console=False, metrics=tmp_path / "said.jsonl") as report:
        loaded = tasks.load_tasks(options(folder, "choose", fewshot=2), report)
    assert loaded is not None
    assert loaded.loaded["tasks"]["choose"].get_config("num_fewshot") == 0
    assert "--fewshot" in (tmp_path / "said.jsonl").read_text()
