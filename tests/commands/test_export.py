"""`octavo export`: the file is the model, with and without an adapter; an adapter alone has llama.cpp's factors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from octavo import adapters
from octavo.ops.quantize import scheme_named
from octavo.store import peft
from octavo.store.gguf import open_gguf
from octavo.store.gguf_names import ARCHITECTURES, gguf_name, to_gguf
from octavo.store.resolve import open_source
from octavo.store.weights import load

Octavo = Callable[..., Any]
IDS = torch.arange(40)[None] % 60


def logits(source: Any, adapter: Path | None = None) -> torch.Tensor:
    model = load(source, scheme_named("none"), dtype=torch.float32, device=torch.device("cpu")).eval()
    if adapter is not None:
        adapters.apply_(model, peft.read(adapter))
    with torch.no_grad():
        found: torch.Tensor = model(IDS)
    return found


def test_a_model_and_its_merged_adapter_have_their_logits(
    octavo: Octavo, tiny_llama: Path, adapter_folder: Path, tmp_path: Path
) -> None:
    source = open_source(str(tiny_llama))
    plain = octavo("export", "--model", tiny_llama, "--type", "f32", "--out", tmp_path / "plain.gguf", "--json")
    assert plain.code == 0, plain.err
    assert plain.json["adapter"] is None
    torch.testing.assert_close(logits(open_gguf(tmp_path / "plain.gguf")), logits(source), rtol=1e-5, atol=1e-5)
    done = octavo(
        "export", "--model", tiny_llama, "--adapter", adapter_folder, "--type", "f32", "--out", tmp_path / "tuned",
        "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert done.json["out"] == str(tmp_path / "tuned.gguf")
    tuned = logits(source, adapter_folder)
    assert (tuned - logits(source)).abs().max() > 1e-3
    torch.testing.assert_close(logits(open_gguf(tmp_path / "tuned.gguf")), tuned, rtol=1e-4, atol=1e-5)
    text = "the king spoke"
    assert open_gguf(tmp_path / "tuned.gguf").tokenizer().encode(text) == source.tokenizer().encode(text)


def test_an_adapter_alone_has_the_change_that_llama_cpp_computes(
    octavo: Octavo, tiny_llama: Path, adapter_folder: Path, tmp_path: Path
) -> None:
    """scale * alpha / r * B A with scale 1, and the rows of q and k in the order of the base's file."""
    out = tmp_path / "lora.gguf"
    done = octavo(
        "export", "--model", tiny_llama, "--adapter", adapter_folder, "--to", "gguf-lora", "--type", "f32", "--out",
        out,
    )  # fmt: skip
    assert done.code == 0, done.err
    reader = gguf.GGUFReader(out)
    alpha = float(reader.fields["adapter.lora.alpha"].parts[-1][0])
    tensors = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    adapter, config = peft.read(adapter_folder), open_source(str(tiny_llama)).config
    assert len(tensors) == 2 * len(adapter.lora)
    for module, (a, b, scaling) in adapter.lora.items():
        name = gguf_name(f"{module}.weight", ARCHITECTURES["llama"])
        found = alpha / a.shape[0] * tensors[f"{name}.lora_b"] @ tensors[f"{name}.lora_a"]
        change = to_gguf(f"{module}.weight", scaling * b.float() @ a.float(), ARCHITECTURES["llama"], config)
        np.testing.assert_allclose(found, change.numpy(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "The model to export is missing"),
        (["--model", "MODEL"], "The output file is missing"),
        (["--model", "MODEL", "--to", "gguf-lora", "--out", "x.gguf"], "--to gguf-lora writes an adapter alone"),
        (["--model", "MODEL", "--out", "TAKEN"], "exists already"),
        (["--model", "MODEL", "--type", "q3", "--out", "x.gguf"], "q3"),
    ],
)
def test_errors_say_what_to_do(
    octavo: Octavo, tiny_llama: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    (taken := tmp_path / "taken.gguf").touch()
    places = {"MODEL": tiny_llama, "TAKEN": taken}
    done = octavo("export", *(places.get(word, word) for word in arguments))
    assert (done.code, message in done.err) == (2, True), done.err
    assert not Path("x.gguf").exists()


def test_gpt_j_is_refused_with_what_can_be_done(octavo: Octavo, tmp_path: Path) -> None:
    from transformers import GPTJConfig, GPTJForCausalLM

    config = GPTJConfig(vocab_size=64, n_embd=32, n_layer=1, n_head=2, rotary_dim=8, n_positions=64)
    GPTJForCausalLM(config).save_pretrained(tmp_path / "gptj")
    done = octavo("export", "--model", tmp_path / "gptj", "--out", tmp_path / "x.gguf")
    assert done.code != 0
    assert "cannot write a gptj model" in done.err
    assert "octavo merge" in done.err
    assert list(tmp_path.glob("*x.gguf*")) == []
