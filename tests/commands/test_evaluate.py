"""commands/evaluate.py: the perplexity table of base, quantized and tuned model, and of several schemes."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tests import devices
from transformers import AddedToken, AutoModelForCausalLM, AutoTokenizer

from octavo.commands import evaluate, loading, quantize
from octavo.config import (
    Config,
    EvaluateOptions,
    ModelOptions,
    ProbeOptions,
    QuantizeOptions,
    TextOptions,
    WindowOptions,
)
from octavo.errors import UsageError
from octavo.hardware import Hardware
from octavo.ops.quantize import SCHEMES
from octavo.reporting import Report

EVALUATE = (ModelOptions, EvaluateOptions, WindowOptions, ProbeOptions, TextOptions)
QUANTIZE = (ModelOptions, QuantizeOptions)
CPU = devices.hardware(devices.CPU)
Evaluate = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def event_file(tmp_path: Path) -> Path:
    """The file of the events of `evaluate`."""
    return tmp_path / "events.jsonl"


@pytest.fixture(name="evaluate")
def table_of(tiny_llama: Path, plays: Path, event_file: Path) -> Evaluate:
    """The table of the tiny Llama on the held-out play, with some options."""

    def table(**options: Any) -> list[dict[str, Any]]:
        values = {"model": str(tiny_llama), "data": [str(plays / "test")], "seq_len": 32, **options}
        event_file.unlink(missing_ok=True)
        with Report(console=False, metrics=event_file) as report:
            rows: list[dict[str, Any]] = evaluate.evaluate(Config.read(EVALUATE, values), report)["rows"]
        return rows

    return table


def quantized(model: Path, out: Path, scheme: str) -> Path:
    """The folder that `octavo quantize` writes."""
    with Report(console=False) as report:
        quantize.quantize(Config.read(QUANTIZE, {"model": str(model), "scheme": scheme, "out": str(out)}), report)
    return out


@pytest.fixture(scope="module")
def int8_folder(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized(tiny_llama, tmp_path_factory.mktemp("int8") / "model", "int8")


def named(rows: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(row["name"], row["scheme"]) for row in rows]


def test_the_table_has_rows_for_base_quantized_and_tuned(evaluate: Evaluate, adapter_folder: Path) -> None:
    rows = evaluate(scheme="int8", adapter=str(adapter_folder))
    assert named(rows) == [("base", "none"), ("quantized base", "int8"), ("tuned", "int8")]
    assert [row["adapter"] for row in rows] == [None, None, str(adapter_folder)]
    assert len({row["tokens"] for row in rows}) == 1
    base, quantized, tuned = (row["perplexity"] for row in rows)
    assert quantized == pytest.approx(base, rel=0.02)
    assert abs(tuned - quantized) > 0.1
    sizes = [row["size_bytes"] for row in rows]
    assert sizes[0] > 2 * sizes[1] == 2 * sizes[2]


def test_the_tuned_model_is_compared_with_the_same_weights_without_the_adapter(
    tiny_llama: Path, plays: Path, adapter_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {"model": str(tiny_llama), "data": [str(plays / "test")], "seq_len": 16, "split_on": "lines"}
    with Report() as report:
        config = Config.read(EVALUATE, {**values, "adapter": str(adapter_folder)})
        result = evaluate.evaluate(config, report)
    rows, [gain] = result["rows"], result["differences"]
    assert (gain["before"], gain["after"]) == ("quantized base", "tuned")
    assert gain["before_scheme"] == gain["after_scheme"] == rows[2]["scheme"]
    assert gain["lower_by"] == pytest.approx(rows[1]["loss"] - rows[2]["loss"])
    assert gain["interval"]["low"] < gain["lower_by"] < gain["interval"]["high"]
    assert (gain["interval"]["level"], gain["interval"]["over"]) == (0.95, "documents")
    for row in rows:
        assert math.exp(row["loss"]) == pytest.approx(row["perplexity"])
        assert row["interval"]["low"] < row["loss"] < row["interval"]["high"]
    printed = capsys.readouterr().err
    assert printed.count(" (perplexity ") == 1  # the verdict
    assert "The loss of tuned is " not in printed


@pytest.mark.parametrize("tuned", [False, True])
def test_compared_schemes_are_paired_with_the_first(
    tiny_llama: Path, plays: Path, adapter_folder: Path, tuned: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {"model": str(tiny_llama), "data": [str(plays / "test")], "seq_len": 16, "split_on": "lines"}
    values |= {"compare": "none,nf4,int8", **({"adapter": str(adapter_folder)} if tuned else {})}
    with Report() as report:
        result = evaluate.evaluate(Config.read(EVALUATE, values), report)
    first, *others = result["rows"]
    assert len(others) == len(result["differences"]) == 2
    for row, difference in zip(others, result["differences"], strict=True):
        assert (difference["before"], difference["before_scheme"]) == (first["name"], "none")
        assert (difference["after"], difference["after_scheme"]) == (row["name"], row["scheme"])
        assert difference["lower_by"] == pytest.approx(first["loss"] - row["loss"])
        assert difference["interval"]["low"] < difference["lower_by"] < difference["interval"]["high"]
    printed, name = capsys.readouterr().err, "tuned" if tuned else "quantized base"
    for scheme in ("nf4", "int8"):
        assert f" of {name} ({scheme}) " in printed
    assert f" {first['name']} (none)" in printed


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
@pytest.mark.parametrize("base", [False, True])
def test_text_with_a_token_that_only_the_adapter_has_is_evaluated_with_it_alone(
    tiny_llama: Path, tmp_path: Path, base: bool, event_file: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.add_tokens([AddedToken("QZX", special=False)])
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    full = ["embed_tokens", "lm_head"]
    tuned = get_peft_model(
        model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=full, task_type="CAUSAL_LM")
    )
    for part in (tuned, tokenizer):
        part.save_pretrained(tmp_path / "adapter")
    (tmp_path / "text.txt").write_text("the QZX king and QZX\n" * 30)
    values = {"model": str(tiny_llama), "data": [str(tmp_path / "text.txt")], "seq_len": 16, "base": base}
    with Report(console=False, metrics=event_file) as report:
        result = evaluate.evaluate(Config.read(EVALUATE, {**values, "adapter": str(tmp_path / "adapter")}), report)
    assert named(result["rows"]) == [("tuned", "int8")]
    assert result["differences"] == []
    assert event_file.read_text().count("is not evaluated") == 1 + base


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [("base", "none"), ("quantized base", "int8")]),
        ({"scheme": "nf4"}, [("base", "none"), ("quantized base", "nf4")]),
        ({"base": False}, [("quantized base", "int8")]),
        ({"scheme": "none"}, [("base", "none")]),
        ({"scheme": "none", "base": False}, [("base", "none")]),
        (
            {"compare": ["nf4", "none", "int8"]},
            [("quantized base", "nf4"), ("base", "none"), ("quantized base", "int8")],
        ),
        ({"compare": "int8,none,int8"}, [("quantized base", "int8"), ("base", "none")]),
        ({"compare": "dynamic8", "base": True}, [("quantized base", "dynamic8")]),
    ],
)
def test_each_selected_model_has_its_row(
    evaluate: Evaluate, options: dict[str, Any], expected: list[tuple[str, str]]
) -> None:
    assert named(evaluate(**options)) == expected


def test_compared_schemes_give_the_same_scores_as_each_alone(evaluate: Evaluate, adapter_folder: Path) -> None:
    together = evaluate(compare=list(SCHEMES))
    assert together == [evaluate(scheme=scheme, base=False)[-1] for scheme in SCHEMES]
    assert len({row["perplexity"] for row in together}) == len(SCHEMES)
    tuned = evaluate(compare=list(SCHEMES), adapter=str(adapter_folder))
    assert tuned == [evaluate(scheme=scheme, base=False, adapter=str(adapter_folder))[-1] for scheme in SCHEMES]
    assert {(row["name"], row["adapter"]) for row in tuned} == {("tuned", str(adapter_folder))}


def test_a_scheme_that_cannot_be_written_fails_before_any_evaluation(
    evaluate: Evaluate, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = quantized(tiny_llama, tmp_path / "dynamic8", "dynamic8")
    monkeypatch.setattr("octavo.runtime.optional.find_spec", lambda _: None)
    assert named(evaluate(model=str(folder))) == [("quantized base", "dynamic8")]
    monkeypatch.setattr("octavo.commands.evaluate.score_rows", lambda *_, **__: pytest.fail("measured"))
    with pytest.raises(UsageError, match="bitsandbytes, which is not installed"):
        evaluate(compare="int8,dynamic8")


def test_the_size_equals_that_of_the_folder_that_quantize_writes(
    evaluate: Evaluate, tiny_llama: Path, tmp_path: Path
) -> None:
    """Also for 16 bits, which a CPU evaluates in float32."""
    half = Path(shutil.copytree(tiny_llama, tmp_path / "half"))
    tensors = load_file(half / "model.safetensors")
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, half / "model.safetensors")
    for model in (tiny_llama, half):
        for row in evaluate(model=str(model), compare=list(SCHEMES)):
            out = quantized(model, tmp_path / f"{model.name}-{row['scheme']}", row["scheme"])
            written = load_file(out / "model.safetensors").values()
            assert row["size_bytes"] == sum(tensor.nbytes for tensor in written)


def test_schemes_are_loaded_one_after_another(evaluate: Evaluate, loaded_models: list[Any]) -> None:
    evaluate(compare=list(SCHEMES))
    assert len(loaded_models) == len(SCHEMES)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"compare": "none,int8"}, ["float32", "bfloat16"]),
        ({"compare": "none,int8", "dtype": "bfloat16"}, ["bfloat16", "bfloat16"]),
        ({"scheme": "none"}, ["float32"]),
        ({"scheme": "nf4"}, ["float32", "bfloat16"]),
        ({"scheme": "nf4", "dtype": "bfloat16"}, ["bfloat16", "bfloat16"]),
    ],
)
@pytest.mark.parametrize("tuned", [False, True])
def test_the_base_is_evaluated_in_full_precision_and_a_tuned_model_in_its_compute_dtype(
    evaluate: Evaluate,
    adapter_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    expected: list[str],
    tuned: bool,
) -> None:
    used: list[str] = []

    def load_model(source: Any, scheme: Any, hardware: Hardware, report: Report) -> Any:
        used.append(str(hardware.dtype).removeprefix("torch."))
        return loading.load_model(source, scheme, hardware, report)

    monkeypatch.setattr(loading, "pick", lambda *_: devices.hardware(devices.CPU, torch.bfloat16))
    monkeypatch.setattr("octavo.commands.evaluate.load_model", load_model)
    evaluate(**options, rows=1, **({"adapter": str(adapter_folder)} if tuned else {}))
    tuned_only = tuned and options.get("scheme") != "nf4"  # with nf4 the first model is the base, without the adapter
    assert used == (["bfloat16"] * len(expected) if tuned_only else expected)


@pytest.mark.parametrize(
    ("options", "hint"),
    [({"compare": ["int8", "int3"]}, "none, int8"), ({"compare": ["int8"], "scheme": "nf4"}, "one of them")],
)
def test_an_invalid_comparison_fails_before_anything_is_read(
    evaluate: Evaluate, options: dict[str, Any], hint: str
) -> None:
    with pytest.raises(UsageError) as caught:
        evaluate(**options, model="nowhere/at/all")
    assert hint in caught.value.hint


def test_a_quantized_folder_has_no_row_for_the_base(evaluate: Evaluate, int8_folder: Path) -> None:
    """It has no full-precision weights; its dequantized weights are not the base."""
    rows = evaluate(model=str(int8_folder))
    assert named(rows) == [("quantized base", "int8")]
    assert rows == evaluate(scheme="int8", base=False), "and it gives what quantising the original gives"


def test_a_warning_says_that_other_schemes_start_from_the_stored_one(
    evaluate: Evaluate, int8_folder: Path, event_file: Path
) -> None:
    expected_rows = evaluate(model=str(int8_folder), compare="int8")
    assert "stored in int8" not in event_file.read_text()
    assert expected_rows == evaluate(compare="int8")
    rows = evaluate(model=str(int8_folder), compare="none,int8,nf4")
    assert "stored in int8" in event_file.read_text()
    assert named(rows) == [("quantized base", "none"), ("quantized base", "int8"), ("quantized base", "nf4")]
    assert rows[1] == expected_rows[0]
    assert rows[0]["perplexity"] == pytest.approx(expected_rows[0]["perplexity"], rel=1e-3)
    assert rows[2]["perplexity"] != evaluate(compare="nf4")[0]["perplexity"]


def test_an_adapter_on_an_unquantized_base_has_two_rows(evaluate: Evaluate, adapter_folder: Path) -> None:
    rows = evaluate(scheme="none", adapter=str(adapter_folder))
    assert named(rows) == [("base", "none"), ("tuned", "none")]


def test_an_adapter_of_another_base_is_applied_with_a_warning(
    evaluate: Evaluate, adapter_folder: Path, tmp_path: Path, event_file: Path
) -> None:
    foreign = Path(shutil.copytree(adapter_folder, tmp_path / "foreign"))
    (foreign / "octavo.json").write_text(json.dumps({"format": 1, "base": {"sha256": "0" * 64}}))
    expected_rows = evaluate(compare="int8,nf4", adapter=str(adapter_folder))
    assert "other base weights" not in event_file.read_text()
    rows = evaluate(compare="int8,nf4", adapter=str(foreign))
    assert event_file.read_text().count("other base weights") == 1
    assert [row["perplexity"] for row in rows] == [row["perplexity"] for row in expected_rows]


def test_text_without_a_target_is_a_usage_error(evaluate: Evaluate, tmp_path: Path) -> None:
    record = {"prompt": "q" * 99, "completion": "king"}
    (path := tmp_path / "long.jsonl").write_text(json.dumps(record) + "\n")
    with pytest.raises(UsageError, match="no token to evaluate"):
        evaluate(data=[str(path)], truncate=True)


def test_rows_limits_the_evaluated_rows(evaluate: Evaluate) -> None:
    everything, little = evaluate(base=False), evaluate(base=False, rows=1)
    assert 0 < little[0]["tokens"] <= 32 < everything[0]["tokens"]


def test_the_error_for_rows_longer_than_the_context_names_the_context(evaluate: Evaluate) -> None:
    with pytest.raises(UsageError, match="--seq-len 128 or less"):
        evaluate(seq_len=129)


def test_full_precision_on_a_cpu_is_float32() -> None:
    assert evaluate.full_precision(devices.hardware(devices.CPU, torch.bfloat16)).dtype == torch.float32
    gpu = devices.hardware(devices.A100)
    assert evaluate.full_precision(gpu) is gpu


def test_a_sliding_window_gives_the_same_scores_with_every_row_length(evaluate: Evaluate) -> None:
    scores = [evaluate(seq_len=length, window=48, stride=16, rows=0)[0] for length in (12, 32)]
    assert scores[0] == scores[1]
    assert (scores[0]["context"], scores[0]["stride"]) == (48, 16)
    plain = [evaluate(seq_len=length)[0] for length in (12, 32)]
    assert plain[0]["perplexity"] != pytest.approx(plain[1]["perplexity"], rel=1e-6)
    assert (plain[0]["context"], plain[0]["stride"]) == (12, None)
    assert scores[0]["tokens"] == plain[0]["tokens"]


def test_the_table_names_the_window(tiny_llama: Path, plays: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = {"model": str(tiny_llama), "data": [str(plays / "test")], "window": 48, "stride": 24, "base": False}
    with Report() as report:
        evaluate.evaluate(Config.read(EVALUATE, values), report)
    assert "Scores with a sliding window of 48 tokens, stride 24" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 16}, "only for a sliding window"),
        ({"stride": 17, "window": 16}, "a stride of 17"),
        ({"stride": 8, "window": 10**6}, "more than the model's context"),
        ({"stride": 8, "truncate": True}, "--truncate"),
    ],
)
def test_a_window_that_cannot_be_is_an_error(evaluate: Evaluate, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        evaluate(**options)
