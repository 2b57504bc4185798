"""run.py: the perplexity table, a model written under a scheme, prompts, and what fits together and what does not."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from octavo import run
from octavo.config import Config, EvaluateOptions, ModelOptions, PromptOptions, QuantizeOptions, TextOptions
from octavo.errors import ModelError, UsageError
from octavo.evaluate import Score
from octavo.hardware import Hardware
from octavo.layers.lora import LoraSpec
from octavo.models import Model
from octavo.ops.quantize import scheme_named
from octavo.report import Report
from octavo.store import adapter
from octavo.store.sources import FolderSource, fingerprint, load_tokenizer

EVALUATE = (ModelOptions, EvaluateOptions, TextOptions)
QUANTIZE = (ModelOptions, QuantizeOptions)
CPU = Hardware(torch.device("cpu"), torch.float32, "for a test", "cpu")
Evaluate = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def evaluate(tiny_llama: Path, plays: Path) -> Evaluate:
    """The table of the tiny Llama on the held-out play, with some options."""

    def table(**options: Any) -> list[dict[str, Any]]:
        values = {"model": str(tiny_llama), "data": [str(plays / "test")], "seq_len": 32, **options}
        with Report(console=False) as report:
            rows: list[dict[str, Any]] = run.evaluate(Config.read(EVALUATE, values), report)["rows"]
        return rows

    return table


@pytest.fixture(scope="module")
def adapter_folder(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random adapter of the tiny Llama, strong enough to change its perplexity."""
    source = FolderSource(tiny_llama)
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    with Report(console=False) as report:
        model = run.load_model(source, scheme_named("none"), CPU, report)
    plan = adapter.AdapterPlan(LoraSpec(2, 4.0))
    adapter.create_(model, plan, seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in adapter.trained(model).items():
        if name.endswith("lora_B"):
            parameter.data.normal_(generator=generator)
    origin = {"base": {"sha256": fingerprint(source)}}
    adapter.save(folder, model, plan, base=str(tiny_llama), origin=origin, card="")
    return folder


@pytest.fixture(scope="module")
def int8_folder(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama written under int8."""
    out = tmp_path_factory.mktemp("int8") / "model"
    with Report(console=False) as report:
        run.quantize(Config.read(QUANTIZE, {"model": str(tiny_llama), "scheme": "int8", "out": str(out)}), report)
    return out


def named(rows: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(row["name"], row["scheme"]) for row in rows]


def test_the_table_names_base_quantised_and_tuned(evaluate: Evaluate, adapter_folder: Path) -> None:
    rows = evaluate(scheme="int8", adapter=str(adapter_folder))
    assert named(rows) == [("base", "none"), ("quantised", "int8"), ("tuned", "int8")]
    assert [row["adapter"] for row in rows] == [None, None, str(adapter_folder)]
    assert len({row["tokens"] for row in rows}) == 1
    base, quantised, tuned = (row["perplexity"] for row in rows)
    assert quantised == pytest.approx(base, rel=0.02)
    assert abs(tuned - quantised) > 0.1


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [("base", "none"), ("quantised", "int8")]),
        ({"scheme": "nf4"}, [("base", "none"), ("quantised", "nf4")]),
        ({"base": False}, [("quantised", "int8")]),
        ({"scheme": "none"}, [("base", "none")]),
        ({"scheme": "none", "base": False}, [("base", "none")]),
    ],
)
def test_each_model_that_was_asked_for_has_its_row(
    evaluate: Evaluate, options: dict[str, Any], expected: list[tuple[str, str]]
) -> None:
    assert named(evaluate(**options)) == expected


def test_an_adapter_on_an_unquantised_base_has_two_rows(evaluate: Evaluate, adapter_folder: Path) -> None:
    rows = evaluate(scheme="none", adapter=str(adapter_folder))
    assert named(rows) == [("base", "none"), ("tuned", "none")]


def test_a_quantised_folder_is_not_passed_off_as_the_base(evaluate: Evaluate, int8_folder: Path) -> None:
    """Its full-precision weights are gone; what it decodes to is no base to compare with."""
    rows = evaluate(model=str(int8_folder))
    assert named(rows) == [("quantised", "int8")]
    assert rows == evaluate(scheme="int8", base=False), "and it gives what quantising the original gives"


def test_text_without_a_target_is_refused(evaluate: Evaluate, tmp_path: Path) -> None:
    record = {"prompt": "q" * 99, "completion": "king"}
    (path := tmp_path / "long.jsonl").write_text(json.dumps(record) + "\n")
    with pytest.raises(UsageError, match="no token to measure"):
        evaluate(data=[str(path)], truncate=True)


def test_rows_limits_what_is_measured(evaluate: Evaluate) -> None:
    everything, little = evaluate(base=False), evaluate(base=False, rows=1)
    assert 0 < little[0]["tokens"] <= 32 < everything[0]["tokens"]


def test_rows_longer_than_the_context_are_refused_with_the_longest_that_fits(evaluate: Evaluate) -> None:
    with pytest.raises(UsageError, match="--seq-len 128 or less"):
        evaluate(seq_len=129)


def test_an_adapter_of_other_weights_is_put_on_with_a_warning(
    tiny_llama: Path, adapter_folder: Path, tmp_path: Path
) -> None:
    foreign = adapter_folder.parent / "foreign"
    foreign.mkdir()
    for file in adapter_folder.iterdir():
        (foreign / file.name).write_bytes(file.read_bytes())
    (foreign / "octavo.json").write_text(json.dumps({"base": {"sha256": "0" * 64}}))
    source = FolderSource(tiny_llama)
    said = []
    for number, folder in enumerate((adapter_folder, foreign)):
        with Report(console=False, metrics=tmp_path / f"{number}.jsonl") as report:
            run.with_adapter_(run.load_model(source, scheme_named("none"), CPU, report), folder, source, report)
        said.append((tmp_path / f"{number}.jsonl").read_text())
    assert "other base weights" not in said[0]
    assert "other base weights" in said[1]


def test_quantising_tells_the_size_and_the_error_of_every_layer(tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    with Report(console=False) as report:
        config = Config.read(QUANTIZE, {"model": str(tiny_llama), "scheme": "int8", "out": str(out)})
        told = run.quantize(config, report)
    assert told["scheme"] == "int8"
    assert {layer["name"] for layer in told["layers"]} >= {"lm_head.weight", "model.layers.1.mlp.up_proj.weight"}
    assert all(0 < layer["error"] < 0.02 for layer in told["layers"])
    for layer in told["layers"]:
        rows, columns = layer["shape"]
        assert layer["bytes"] == rows * columns + 4 * rows, "a byte a weight, a float32 scale a row"
    files = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    assert sum(layer["bytes"] for layer in told["layers"]) <= told["bytes"] <= files


def test_quantising_needs_a_new_folder(tiny_llama: Path, int8_folder: Path) -> None:
    with Report(console=False) as report:
        with pytest.raises(UsageError, match="--out"):
            run.quantize(Config.read(QUANTIZE, {"model": str(tiny_llama)}), report)
        before = sorted(file.stat().st_mtime_ns for file in int8_folder.iterdir())
        with pytest.raises((UsageError, ModelError), match="already"):
            run.quantize(Config.read(QUANTIZE, {"model": str(tiny_llama), "out": str(int8_folder)}), report)
    assert sorted(file.stat().st_mtime_ns for file in int8_folder.iterdir()) == before


def test_auto_takes_the_folders_own_scheme_and_else_int8(tiny_llama: Path, int8_folder: Path) -> None:
    auto = ModelOptions.model_validate({})
    assert run.chosen_scheme(auto, FolderSource(tiny_llama)).name == "int8"
    assert run.chosen_scheme(auto, FolderSource(int8_folder)).name == "int8"
    assert run.chosen_scheme(ModelOptions.model_validate({"scheme": "nf4"}), FolderSource(tiny_llama)).name == "nf4"


def test_a_prompt_is_encoded_as_text_or_as_a_users_message(tiny_llama: Path) -> None:
    tokenizer = load_tokenizer(tiny_llama)
    plain = run.prompt_ids(PromptOptions.model_validate({"prompt": "the king"}), tokenizer)
    chat = run.prompt_ids(PromptOptions.model_validate({"prompt": "the king", "chat": True}), tokenizer)
    assert tokenizer.decode(plain) == "the king"
    assert tokenizer.decode(chat) == "<|im_start|>user\nthe king<|im_end|>\n<|im_start|>assistant\n"


def test_a_perplexity_beyond_a_float_is_infinite() -> None:
    """A model that has diverged is measured, not a crash at the end of the run."""
    assert Score(nats=8000.0, tokens=10, n_bytes=10).perplexity == math.inf
    assert Score(nats=8000.0, tokens=100, n_bytes=10).perplexity == pytest.approx(math.exp(80))


def test_full_precision_on_a_cpu_is_float32() -> None:
    assert run.full_precision(Hardware(CPU.device, torch.bfloat16, "", "cpu")).dtype == torch.float32
    card = Hardware(torch.device("cuda"), torch.bfloat16, "", "card")
    assert run.full_precision(card) is card


def test_the_model_can_be_asked_for_its_ends(tiny_llama: Path) -> None:
    assert set(run.end_ids(FolderSource(tiny_llama))) == {2}


def test_a_loaded_model_is_in_eval_mode(tiny_llama: Path) -> None:
    with Report(console=False) as report:
        model: Model = run.load_model(FolderSource(tiny_llama), scheme_named("none"), CPU, report)
    assert not model.training
