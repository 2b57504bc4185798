"""`octavo.load`: the decoder, generation and perplexity are those of the commands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import octavo
from octavo import LanguageModel


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> LanguageModel:
    loaded = octavo.load(tiny_llama, scheme="none", dtype="float32", max_new_tokens=6, temperature=0, quiet=True)
    assert isinstance(loaded, LanguageModel)
    return loaded


def test_the_decoder_has_the_logits_of_transformers(model: LanguageModel, tiny_llama: Path) -> None:
    ids = torch.tensor([model.tokenizer("the king spoke to the queen")["input_ids"]])
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(tiny_llama)(ids).logits
        torch.testing.assert_close(model.decoder(ids), expected, rtol=0, atol=1e-5)
    assert repr(model) == "LanguageModel(llama, 2 layers, width 32, vocabulary 300)"


def test_an_adapter_and_a_scheme_are_those_of_the_command(
    model: LanguageModel, tiny_llama: Path, adapter_folder: Path
) -> None:
    tuned = octavo.load(tiny_llama, adapter=adapter_folder, scheme="int8", quiet=True)
    ids = torch.tensor([tuned.tokenizer("the king spoke to the queen")["input_ids"]])
    with torch.no_grad():
        assert (tuned.decoder(ids) - model.decoder(ids)).abs().max() > 0.1
    assert tuned.decoder.embed.matrix.scheme.name == "int8"
    options: dict[str, Any] = {"temperature": 0.9, "seed": 5, "max_new_tokens": 12}
    wanted = octavo.generate("the king", model=tiny_llama, adapter=adapter_folder, scheme="int8", quiet=True, **options)
    assert tuned.generate("the king", **options) == wanted


def test_the_options_of_load_are_the_defaults_of_generate(model: LanguageModel, tiny_llama: Path) -> None:
    first = model.generate("the king")
    assert first == model.generate("the king")
    assert len(first["token_ids"]) == 6
    assert len(model.generate("the king", max_new_tokens=2)["token_ids"]) == 2
    assert model.generate("the king", temperature=2.0, seed=1) != first
    chat = octavo.generate(
        "the king", model=tiny_llama, scheme="none", dtype="float32", chat=True, max_new_tokens=6, temperature=0,
        quiet=True,
    )  # fmt: skip
    assert model.chat("the king") == chat != first
    turns = [{"role": "user", "content": "the king"}]
    assert model.chat(turns) == chat
    assert model.chat([*turns, {"role": "assistant", "content": "spoke"}, *turns]) != chat
    assert "".join(model.stream("the king")) == first["text"]
    assert "".join(model.stream_chat("the king")) == chat["text"]


def test_wrong_options_of_generate_are_errors(model: LanguageModel) -> None:
    with pytest.raises(octavo.UnknownOptionError, match="Did you mean max_new_tokens"):
        model.generate("x", max_tokens=3)
    with pytest.raises(octavo.UnknownOptionError, match="no option 'adapter'"):
        model.generate("x", adapter="y")
    with pytest.raises(octavo.UsageError, match="top_p: must be less than or equal to 1, not 2"):
        model.generate("x", top_p=2)


def test_values_of_other_types_are_errors_that_name_the_parameter(model: LanguageModel) -> None:
    anything: Any = model
    for method, text, options, message in (
        ("generate", ["x"], {}, r"^prompt: must be a string, not \['x'\]"),
        ("generate", b"x", {}, r"^prompt: must be a string, not b'x'"),
        ("stream", 7, {}, r"^prompt: must be a string, not 7"),
        ("chat", [], {}, r"^messages: must be a string, or a list of .*, not \[\]"),
        ("chat", [{"role": "user"}], {}, r"^messages: must be a string, or a list of"),
        ("stream_chat", [{"role": "user", "content": "\ud800"}], {}, r"^messages: must be Unicode text"),
        ("generate", "x", {"max_new_tokens": True}, r"^max_new_tokens: must be a number, not True"),
        ("evaluate", b"x", {}, r"^text: must be a string, or a list of strings, not b'x'"),
        ("perplexity", ["x", 3], {}, r"^text: must be a string, or a list of strings"),
        ("perplexity", "the king", {"seq_len": True}, r"^seq_len: must be a number, not True"),
        ("perplexity", "the king", {"seq_len": "long"}, r"^seq_len: must be a number, not 'long'"),
    ):
        with pytest.raises(octavo.UsageError, match=message) as caught:
            getattr(anything, method)(text, **options)
        assert caught.value.hint


@pytest.mark.parametrize(("seq_len", "window"), [(None, {}), (16, {}), (16, {"stride": 8, "window": 32})])
def test_perplexity_is_that_of_the_command(
    seq_len: int | None, window: dict[str, int], model: LanguageModel, tiny_llama: Path, plays: Path
) -> None:
    files = sorted((plays / "train").iterdir())[:3]
    table = octavo.evaluate(
        model=tiny_llama, data=files, scheme="none", dtype="float32", seq_len=seq_len or 128, quiet=True, **window
    )
    texts = [file.read_text() for file in files]
    found = model.evaluate(texts, seq_len=seq_len, **window)
    wanted = table["rows"][0]
    assert found["tokens"] == wanted["tokens"]
    assert found["perplexity"] == pytest.approx(wanted["perplexity"], rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(wanted["bits_per_byte"], rel=1e-5)
    assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
    assert (found["interval"] is None) == (wanted["interval"] is None) == (seq_len is None)
    if found["interval"] and wanted["interval"]:
        assert found["interval"] == {**wanted["interval"], **found["interval"]}
        for bound in ("low", "high"):
            assert found["interval"][bound] == pytest.approx(wanted["interval"][bound], rel=1e-4)
    assert (model.perplexity(texts, seq_len=seq_len) == found["perplexity"]) == (not window)
    assert model.perplexity(texts[0]) != found["perplexity"]


def test_texts_that_cannot_be_measured_are_errors(model: LanguageModel) -> None:
    for text in ("", "k", ["k"]):  # the last token of a text is EOS, which has no bytes
        with pytest.raises(octavo.UsageError, match="no token to evaluate"):
            model.evaluate(text)
    with pytest.raises(octavo.UsageError, match="Text 2 is not Unicode text"):
        model.perplexity(["the king", "\ud800"])
    with pytest.raises(octavo.UsageError, match="prompt is not Unicode text"):
        model.generate("\ud800")
    with pytest.raises(octavo.UsageError, match="more than the model's context of 128 tokens"):
        model.perplexity("the king", seq_len=129)
