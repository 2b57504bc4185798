"""commands/loading.py and quantize.py: quantized folders; compatible models, adapters and tokenizers."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import devices
from tests.conftest import Octavo

from octavo.commands import generate, loading, quantize
from octavo.config import Config, ModelOptions, QuantizeOptions, RunOptions, TextOptions
from octavo.errors import AdapterError, ModelError, UsageError
from octavo.layers.lora import LoraSpec
from octavo.metrics import Score
from octavo.models import Decoder, build, weight_entries
from octavo.ops.quantize import scheme_named
from octavo.reporting import Report
from octavo.store import base_names, peft
from octavo.store.hf_folder import write_folder
from octavo.store.sources import FolderSource
from octavo.store.tokenizer_files import load_tokenizer

QUANTIZE = (ModelOptions, QuantizeOptions)
CPU = devices.hardware(devices.CPU)


@pytest.fixture(scope="module")
def int8_folder(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama, quantized to int8."""
    out = tmp_path_factory.mktemp("int8") / "model"
    with Report(console=False) as report:
        quantize.quantize(Config.read(QUANTIZE, {"model": str(tiny_llama), "scheme": "int8", "out": str(out)}), report)
    return out


def test_quantize_ends_with_both_sizes_and_the_next_command(
    octavo: Octavo, tiny_llama: Path, int8_folder: Path, tmp_path: Path
) -> None:
    done = octavo("quantize", "--model", tiny_llama, "--scheme", "int8", "--out", tmp_path / "a b")
    last = done.out.strip().splitlines()[-1]
    before = (tiny_llama / "model.safetensors").stat().st_size
    assert re.match(rf"{before / 2**20:.1f} MiB of weight files before, [\d.]+ MiB now\. Next: ", last)
    assert last.endswith(f"octavo finetune --model '{tmp_path / 'a b'}' --data YOUR_TEXTS")
    assert "the errors are against" not in done.err
    again = octavo("quantize", "--model", int8_folder, "--scheme", "nf4", "--out", tmp_path / "again")
    assert "is quantized to int8 already: the errors are against its dequantized weights" in again.err
    copied = octavo("quantize", "--model", int8_folder, "--scheme", "int8", "--out", tmp_path / "copied", "--json")
    assert "the errors are against" not in copied.err, "the weights are copied"
    assert copied.json["bytes_before"] == sum(path.stat().st_size for path in int8_folder.glob("*.safetensors"))


def test_quantize_returns_the_size_and_the_error_of_every_layer(tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    with Report(console=False) as report:
        config = Config.read(QUANTIZE, {"model": str(tiny_llama), "scheme": "int8", "out": str(out)})
        result = quantize.quantize(config, report)
    assert result["scheme"] == "int8"
    assert {layer["name"] for layer in result["layers"]} >= {"lm_head.weight", "model.layers.1.mlp.up_proj.weight"}
    assert all(0 < layer["error"] < 0.02 for layer in result["layers"])
    for layer in result["layers"]:
        rows, columns = layer["shape"]
        assert layer["bytes"] == rows * columns + 4 * rows, "a byte a weight, a float32 scale a row"
    files = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    assert sum(layer["bytes"] for layer in result["layers"]) <= result["bytes"] <= files


def test_quantize_needs_a_new_folder(tiny_llama: Path, int8_folder: Path) -> None:
    with Report(console=False) as report:
        with pytest.raises(UsageError, match="--out"):
            quantize.quantize(Config.read(QUANTIZE, {"model": str(tiny_llama)}), report)
        before = sorted(file.stat().st_mtime_ns for file in int8_folder.iterdir())
        with pytest.raises((UsageError, ModelError), match="already"):
            quantize.quantize(Config.read(QUANTIZE, {"model": str(tiny_llama), "out": str(int8_folder)}), report)
    assert sorted(file.stat().st_mtime_ns for file in int8_folder.iterdir()) == before


def test_auto_is_the_scheme_of_the_checkpoint_or_int8(tiny_llama: Path, int8_folder: Path) -> None:
    auto = ModelOptions.model_validate({})
    assert loading.chosen_scheme(auto, FolderSource(tiny_llama)).name == "int8"
    assert loading.chosen_scheme(auto, FolderSource(int8_folder)).name == "int8"
    assert loading.chosen_scheme(ModelOptions.model_validate({"scheme": "nf4"}), FolderSource(tiny_llama)).name == "nf4"


def test_a_prompt_is_encoded_as_text_or_as_a_user_message(tiny_llama: Path) -> None:
    tokenizer = load_tokenizer(tiny_llama)
    plain = generate.prompt_ids("the king", tokenizer, chat=False)
    chat = generate.prompt_ids("the king", tokenizer, chat=True)
    assert tokenizer.decode(plain) == "the king"
    assert tokenizer.decode(chat) == "<|im_start|>user\nthe king<|im_end|>\n<|im_start|>assistant\n"


def test_a_perplexity_beyond_float_range_is_infinite() -> None:
    """A model that has diverged is evaluated without an exception at the end of the run."""
    assert Score(nats=8000.0, tokens=10, n_bytes=10).perplexity == math.inf
    assert Score(nats=8000.0, tokens=100, n_bytes=10).perplexity == pytest.approx(math.exp(80))


def test_the_eos_ids_of_a_model_are_read(tiny_llama: Path) -> None:
    assert set(loading.end_ids(FolderSource(tiny_llama))) == {2}


@pytest.mark.parametrize("value", ["2", [2, None], [True], -1, 2**40, {}, [1.5], list(range(2000))])
def test_invalid_eos_ids_are_an_error(value: object, tiny_llama: Path) -> None:
    source = FolderSource(tiny_llama)
    source.generation_config["eos_token_id"] = value
    with pytest.raises(ModelError, match="eos_token_id is"):
        loading.end_ids(source)


def test_a_loaded_model_is_in_eval_mode(tiny_llama: Path) -> None:
    with Report(console=False) as report:
        model: Decoder = loading.load_model(FolderSource(tiny_llama), scheme_named("none"), CPU, report)
    assert not model.training


def test_the_base_is_hashed_only_for_an_adapter_that_names_its_base(
    tiny_llama: Path, adapter_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hashing reads all weights: half a minute for 12 GB."""
    foreign = Path(shutil.copytree(adapter_folder, tmp_path / "foreign"))
    (foreign / "octavo.json").unlink()
    hashed: list[str] = []

    def fingerprint(source: object) -> str:
        hashed.append("base")
        return "another"

    monkeypatch.setattr(base_names, "fingerprint", fingerprint)
    with Report(console=False) as report:
        source = FolderSource(tiny_llama)
        assert loading.read_adapter(foreign, source, report)[1].trained_on is None
        assert not hashed
        assert loading.read_adapter(adapter_folder, source, report)[1].trained_on
        assert hashed == ["base"]


def test_an_adapter_with_added_tokens_is_used_with_its_own_tokenizer(
    octavo: Octavo, tiny_llama: Path, tmp_path: Path
) -> None:
    """The base has no embedding rows for those tokens: it has no row in the table, and there is a warning."""
    source = FolderSource(tiny_llama)
    tables = {name: source.tensor(name) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    tokenizer = source.tokenizer()
    tokenizer.add_tokens(["<extra_a>", "<extra_b>"])
    rows = max(tokenizer.get_vocab().values()) + 1
    generator = torch.Generator().manual_seed(0)
    full = {
        name: torch.cat([table, torch.randn(rows - len(table), table.shape[1], generator=generator)])
        for name, table in tables.items()
    }
    adapter = peft.Adapter(LoraSpec(), {}, full)
    peft.write(
        tmp_path / "adapter", adapter, modules=weight_entries(build(source.config)), biases=False, base="", readme=""
    )
    (tmp_path / "text.txt").write_text("the king <extra_b> said")
    options = ("--model", tiny_llama, "--adapter", tmp_path / "adapter", "--scheme", "none", "--dtype", "float32")
    without = octavo("evaluate", *options, "--json", "--seq-len", 32, tmp_path / "text.txt")
    assert [row["name"] for row in json.loads(without.out)["rows"]] == ["base", "tuned"], without.err
    tokenizer.save_pretrained(tmp_path / "adapter")
    done = octavo("evaluate", *options, "--json", "--seq-len", 32, tmp_path / "text.txt")
    assert done.code == 0, done.err
    assert [row["name"] for row in json.loads(done.out)["rows"]] == ["tuned"]
    assert "base is not evaluated" in done.err
    assert "its tokenizer (" in done.err
    assert json.loads(done.out)["rows"][0]["tokens"] < json.loads(without.out)["rows"][0]["tokens"]
    assert octavo("generate", *options, "--prompt", "the <extra_a>", "--max-new-tokens", 2).code == 0


def test_an_adapter_with_fewer_embedding_rows_than_tokens_is_an_error(tiny_llama: Path, tmp_path: Path) -> None:
    adapter = peft.Adapter(LoraSpec(), {}, {"model.embed_tokens.weight": torch.ones(3, 4)})
    with Report(console=False) as report, pytest.raises(AdapterError, match="has 3 rows"):
        loading.tokenizer_with(adapter, tmp_path, FolderSource(tiny_llama), report)


@pytest.mark.parametrize("device", ["mps", "cuda:99", "tpu"])
def test_quantize_refuses_a_device_that_is_not_available(tiny_llama: Path, tmp_path: Path, device: str) -> None:
    config = Config.read(QUANTIZE, {"model": str(tiny_llama), "out": str(tmp_path / "out"), "device": device})
    with Report(console=False) as report, pytest.raises(UsageError, match=f"[Dd]evice '{device}'"):
        quantize.quantize(config, report)
    assert not (tmp_path / "out").exists()


def test_rows_have_the_context_of_the_model_if_the_default_is_more(tiny_llama: Path, tmp_path: Path) -> None:
    source, kinds = FolderSource(tiny_llama), (ModelOptions, TextOptions, RunOptions)
    with Report(console=False, metrics=tmp_path / "said") as report:
        for given, expected in (({}, 128), ({"seq_len": 64}, 64), ({"seq_len": 512}, 512)):
            config = loading.with_fitting_rows(Config.read(kinds, given), source, report)
            assert config[TextOptions].seq_len == expected
        saved = Config.read(kinds, {"seq_len": 512, "resume": True})  # of a run that was killed before its plan
        assert loading.with_fitting_rows(saved, source, report)[TextOptions].seq_len == 128
    assert (tmp_path / "said").read_text().count("Rows have 128 tokens, the model's context.") == 2


@pytest.mark.parametrize("scheme", ["none", "nf4-double"])
def test_the_progress_of_loading_ends_at_its_total(
    tiny_llama: Path, tmp_path: Path, scheme: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A quantized folder has several tensors of one weight."""
    write_folder(FolderSource(tiny_llama), tmp_path / "written", scheme_named(scheme))
    source, cpu = FolderSource(tmp_path / "written"), devices.hardware(devices.CPU, torch.float32)
    with Report() as report:
        loading.load_model(source, scheme_named(scheme), cpu, report)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Loading weights")]
    steps = re.search(r": (\d+)/(\d+)", line)
    assert steps
    assert steps[1] == steps[2] != "0"


def test_chat_needs_a_chat_template(octavo: Octavo, tiny_llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    (folder / "chat_template.jinja").unlink()
    done = octavo("chat", "--model", folder)
    assert done.code == 2
    assert "has no chat template, so it cannot chat" in done.err
    assert "octavo generate" in done.err
    assert "Loading weights" not in done.err


@pytest.mark.parametrize("command", [("data",), ("evaluate", "--scheme", "none", "--rows", 1)])
def test_a_command_without_a_row_length_uses_the_context_and_says_so_once(
    octavo: Octavo, tiny_llama: Path, plays: Path, command: tuple[object, ...]
) -> None:
    done = octavo(*command, "--model", tiny_llama, plays / "test")
    assert done.code == 0, done.err
    assert done.err.count("Rows have 128 tokens, the model's context.") == 1


LINEARS = ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")


def test_commands_say_once_on_which_modules_an_adapter_is(
    tiny_llama: Path, adapter_folder: Path, plays: Path, octavo: Octavo
) -> None:
    line = f"The adapter has LoRA on 14 modules of 2 layers: {', '.join(LINEARS)}.\n"
    common = ("--model", tiny_llama, "--adapter", adapter_folder)
    generated = octavo("generate", *common, "--prompt", "the", "--max-new-tokens", 1)
    evaluated = octavo("evaluate", *common, "--json", "--compare", "int8,none", "--rows", 1, plays / "test")
    assert (generated.err.count(line), evaluated.err.count(line)) == (1, 1)
    assert evaluated.json["attached"] == dict.fromkeys(LINEARS, 2)


def test_commands_refuse_an_adapter_that_lacks_a_module(
    tiny_llama: Path, adapter_folder: Path, plays: Path, tmp_path: Path, octavo: Octavo
) -> None:
    folder = Path(shutil.copytree(adapter_folder, tmp_path / "adapter"))
    (folder / "octavo.json").unlink()
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(
        {key: t for key, t in tensors.items() if "1.mlp.up_proj" not in key}, folder / "adapter_model.safetensors"
    )
    for command, options in (("generate", ("--prompt", "the")), ("evaluate", (plays / "test",))):
        refused = octavo(command, "--model", tiny_llama, "--adapter", folder, *options)
        assert refused.code != 0
        assert "lack what adapter_config.json selects: model.layers.1.mlp.up_proj." in refused.err
