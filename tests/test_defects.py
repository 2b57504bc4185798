"""Defects of the script that first fine-tuned hivemind/gpt-j-6B-8bit, and of its server: octavo has none of them.

One test for each, named after what octavo does instead; the docstring says what the script did.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from octavo.commands.data import read_documents, to_text
from octavo.commands.finetune import finetune
from octavo.commands.generate import open_model
from octavo.config import Config, TextOptions
from octavo.config import commands as sections
from octavo.errors import UsageError
from octavo.reporting import Report
from octavo.store.tokenizer_files import load_tokenizer
from octavo.train.optim import LossScaler

Octavo = Callable[..., Any]
Tune = Callable[..., dict[str, Any]]

EVERY_LAYER = ["all-linear", "lm_head", "wte"]


@pytest.fixture
def tune(tiny_gptj: Path, plays: Path) -> Tune:
    """A run of two steps on the tiny GPT-J, with some options changed."""

    def run(out: Path, **options: Any) -> dict[str, Any]:
        values = {
            "model": str(tiny_gptj), "data": [str(plays / "train")], "test_data": [str(plays / "test")],
            "out": str(out), "dtype": "float32", "seq_len": 32, "steps": 2, "rank": 2, "lr": 0.03, "eval_rows": 2,
            "sample_tokens": 4, "sample_prompt": ["the king"], "probes": False,
        }  # fmt: skip
        return finetune(Config.read(sections.FINETUNE, {**values, **options}), console=False)

    return run


def events(run: Path, name: str) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == name]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Watch(TorchDispatchMode):
    """Calls `see` with the name of every torch operation and its new tensors, without views."""

    def __init__(self, see: Callable[[str, list[Tensor]], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.see = see

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        existing = {value.untyped_storage().data_ptr() for value in _tensors((args, kwargs or {}))}
        fresh = [value for value in _tensors(result) if value.untyped_storage().data_ptr() not in existing]
        self.see(func.overloadpacket.__name__, fresh)
        return result


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def test_embedded_adapters_are_applied_and_reported(
    octavo: Octavo, seed: Any, tune: Tune, tiny_llama: Path, tmp_path: Path
) -> None:
    """The server loaded the saved model without its adapters, without a warning, and served the untuned model."""
    ids = torch.arange(3, 20)[None]
    config = Config.read(sections.GENERATE, {"model": str(seed.folder), "allow_pickle": True, "dtype": "float32"})
    with Report(console=False, metrics=tmp_path / "said.jsonl") as report, torch.no_grad():
        served = open_model(config, report).model(ids)
        expected = seed.model(ids).logits
    assert float((served - expected).abs().max()) <= 1e-5
    assert "trained adapters on 14 layers: they are applied" in (tmp_path / "said.jsonl").read_text()
    # The sample of the tuned model in the run equals the output with its adapter, and differs from that of the base.
    tune(tmp_path / "run", steps=20)
    sampled = ("--temperature", 0.7, "--top-p", 0.9, "--max-new-tokens", 4, "--dtype", "float32", "--json")
    model = ("--model", json.loads((tmp_path / "run" / "adapter" / "octavo.json").read_text())["base"]["name"])
    tuned = octavo("generate", "the king", *model, "--adapter", tmp_path / "run" / "adapter", *sampled)
    base = octavo("generate", "the king", *model, *sampled)
    shown = {event["which"]: event["text"] for event in events(tmp_path / "run", "sample")}
    assert (base.json["text"], tuned.json["text"]) == (shown["base"], shown["tuned"])
    assert shown["base"] != shown["tuned"]
    foreign = octavo("generate", "the", "--model", tiny_llama, "--adapter", tmp_path / "run" / "adapter")
    assert (foreign.code, foreign.out) == (1, "")
    assert "does not belong to this model" in foreign.err


def test_recomputation_runs_blocks_twice_in_training(tune: Tune, tmp_path: Path) -> None:
    """Checkpointing was enabled, but the model was in eval mode, where it has no effect."""
    matmuls = {"mm": 0, "addmm": 0, "addmm_": 0, "bmm": 0}

    def count(name: str, _: list[Tensor]) -> None:
        if name in matmuls:
            matmuls[name] += 1

    counts, adapters = [], []
    for recompute in ("none", "full"):
        matmuls.update(dict.fromkeys(matmuls, 0))
        with Watch(count):
            tune(tmp_path / recompute, recompute=recompute, steps=2, test_data=[], test_fraction=0)
        counts.append(sum(matmuls.values()))
        adapters.append(load_file(tmp_path / recompute / "adapter" / "adapter_model.safetensors"))
    assert counts[1] >= counts[0] + 2 * 2, "two steps, two blocks, at least one matmul each"
    for name, tensor in adapters[0].items():
        torch.testing.assert_close(adapters[1][name], tensor, rtol=1e-4, atol=1e-5)


def test_a_run_in_an_existing_folder_is_saved(octavo: Octavo, tune: Tune, tmp_path: Path) -> None:
    """If the output folder existed, saving failed at the end of training without an error, and lost the weights."""
    out = tmp_path / "run"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    outcome = tune(out)
    assert Path(outcome["adapter"], "adapter_model.safetensors").is_file()
    assert (out / "notes.txt").read_text() == "mine"
    before = files_of(out)
    with pytest.raises(UsageError, match="already contains a run") as caught:
        tune(out, steps=9)
    assert "--resume" in caught.value.hint
    assert files_of(out) == before, "the error precedes the first step, and the first run is unchanged"


def test_all_tokens_of_a_text_and_its_end_token_are_labels(
    tiny_gptj: Path, plays: Path, tune: Tune, tmp_path: Path
) -> None:
    """Every line was a separate example, truncated to 128 tokens, without an end token."""
    tokenizer, end = load_tokenizer(tiny_gptj), 2
    long_line = tmp_path / "one-long-line.txt"
    long_line.write_text("where is my lord the duke of york " * 80)
    paths = [str(plays / "train"), str(long_line)]
    with Report(console=False) as report:
        options = TextOptions.model_validate({"seq_len": 32})
        text = to_text(read_documents(paths, options), options, tokenizer, report)
    written = [path.read_text() for path in [*sorted((plays / "train").iterdir()), long_line]]
    labels = [int(label) for row in text.rows for label in row.labels if label >= 0]
    assert max(len(tokenizer.encode(text)) for text in written) > 2 * 128
    # Packing changes the order of documents.
    assert sorted(labels) == sorted(id for text in written for id in [*tokenizer.encode(text)[1:], end])
    assert labels.count(end) == len(written) == 7
    assert any("\n" in tokenizer.decode(row.ids.tolist()[4:-4]) for row in text.rows)
    tune(tmp_path / "run", data=paths)
    ledger = json.loads((tmp_path / "run" / "ledger.json").read_text())["train"]
    assert (ledger["trained"], ledger["left_out"], ledger["documents"]) == (len(labels), 0, 7)


def test_a_tuned_model_generates_the_end_token(octavo: Octavo, tiny_gptj: Path, tune: Tune, tmp_path: Path) -> None:
    """Without end tokens in the training text the tuned model always generated the maximum number of tokens."""
    (data := tmp_path / "short").mkdir()
    for number in range(8):
        (data / f"{number}.txt").write_text("my lord the duke of york")
    tune(tmp_path / "run", data=[str(data)], test_data=[], test_fraction=0, steps=60, lr=0.02, lora_targets=EVERY_LAYER)
    done = octavo(
        "generate", "my lord", "--model", tiny_gptj, "--adapter", tmp_path / "run" / "adapter", "--temperature", 0,
        "--max-new-tokens", 40, "--json",
    )  # fmt: skip
    assert (done.json["text"], done.json["finish_reason"]) == (" the duke of york", "stop")


def test_the_test_files_are_evaluated(tune: Tune, plays: Path, tmp_path: Path) -> None:
    """The test files were loaded and never used: the tuned model was not evaluated."""
    (other := tmp_path / "other.txt").write_text("0123456789 ZYXWVU " * 9)
    runs = {"plays": [str(plays / "test")], "other": [str(other)]}
    rows = {name: tune(tmp_path / name, test_data=data, eval_rows=0)["rows"] for name, data in runs.items()}
    for name in runs:
        quantized, tuned = rows[name]
        held_out = json.loads((tmp_path / name / "ledger.json").read_text())["test"]
        assert quantized["tokens"] == tuned["tokens"] == held_out["trained"] > 0
        assert tuned["perplexity"] != quantized["perplexity"]
        assert events(tmp_path / name, "heldout")
    assert rows["plays"][0]["perplexity"] != pytest.approx(rows["other"][0]["perplexity"], rel=0.01)
    first, second = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in runs)
    assert all(torch.equal(first[name], second[name]) for name in first), "the test files are not trained on"


def test_float16_gradients_neither_underflow_nor_overflow_without_a_warning(
    tune: Tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training in float16 had no loss scaler: small gradients became zero, large ones NaN."""
    small = {"alpha": 2e-4, "batch_size": 32, "steps": 1, "test_data": [], "test_fraction": 0}
    norms = {}
    for dtype in ("float32", "float16"):
        tune(tmp_path / dtype, dtype=dtype, scheme="none", **small)
        norms[dtype] = events(tmp_path / dtype, "step")[0]["grad_norm"]
    assert 0 < norms["float32"] < 1e-4
    assert norms["float16"] == pytest.approx(norms["float32"], rel=0.02)
    # A scale that is far too large: with 128 tokens and a loss of some nats per token, the gradient of a logit exceeds
    # 1e5. The scale halves in every step, and the updates are too small to change the gradients of the next step.
    begin = LossScaler.__init__

    def too_large(scaler: LossScaler, *arguments: Any, **options: Any) -> None:
        begin(scaler, *arguments, **options)
        scaler.scale *= 2**11 if scaler.active else 1

    monkeypatch.setattr(LossScaler, "__init__", too_large)
    many = {"scheme": "none", "lr": 1e-9, "steps": 13}
    answers = {dtype: tune(tmp_path / f"{dtype}-many", dtype=dtype, **many) for dtype in norms}
    warnings = [event["text"] for event in events(tmp_path / "float16-many", "warn")]
    skipped = [int(text.split()[1].rstrip(":")) for text in warnings if "overflowed float16, update skipped" in text]
    assert skipped[0] == 1
    assert len(skipped) <= 11, "the scale decreases until gradients are finite"
    steps = [events(tmp_path / f"{dtype}-many", "step") for dtype in ("float16", "float32")]
    for half, full in zip(*steps, strict=True):
        if half["step"] not in skipped:
            assert half["grad_norm"] == pytest.approx(full["grad_norm"], rel=0.02)
    assert answers["float16"]["train_loss"] == pytest.approx(answers["float32"]["train_loss"], rel=0.01)


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_all_adapters_on_stacked_frozen_layers_are_trained(tune: Tune, tmp_path: Path, recompute: str) -> None:
    """`output += adapter(x)` changed a view in place, an error in newer versions of PyTorch."""
    tune(tmp_path / "run", lora_targets=EVERY_LAYER, recompute=recompute, scheme="dynamic8", dropout=0.1)
    saved = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    initially_zero = [name for name in saved if name.endswith(("lora_B.weight", "lora_embedding_A"))]
    assert len(initially_zero) == 2 * 6 + 2
    assert all(saved[name].any() for name in initially_zero)


def test_an_embedding_lookup_dequantizes_only_its_rows(seed: Any, tmp_path: Path) -> None:
    """Every lookup dequantized the entire matrix, 788 MiB of GPT-J-6B in float32."""
    folder = Path(shutil.copytree(seed.folder, tmp_path / "plain"))
    tensors = torch.load(folder / "pytorch_model.bin", weights_only=True)
    torch.save({name: t for name, t in tensors.items() if ".adapter." not in name}, folder / "pytorch_model.bin")
    config = Config.read(sections.GENERATE, {"model": str(folder), "allow_pickle": True, "dtype": "float32"})
    with Report(console=False) as report:
        model = open_model(config, report).model
    ids = torch.tensor([[0, 299, 131]])
    sizes: list[int] = []
    with torch.no_grad(), Watch(lambda _, result: sizes.extend(tensor.nbytes for tensor in result)):
        rows = model.embed(ids)
    assert torch.equal(rows[0], seed.model.transformer.wte.read()[ids[0]])
    # Three rows of 64 values; their indices in the flattened matrix are 64-bit integers.
    assert 0 < max(sizes) <= 3 * 64 * 8
    assert model.embed.matrix.parts["weight"].nbytes == 300 * 64, "the matrix is stored in one byte per value"
