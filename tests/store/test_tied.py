"""A head that is stored in spite of `tie_word_embeddings: true` is used if it differs, as in transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPTJConfig, LlamaConfig

from octavo.models import Decoder
from octavo.ops.quantize import scheme_named
from octavo.store.hf_folder import write_folder
from octavo.store.sources import FolderSource
from octavo.store.weights import load

from .conftest import LLAMA, write_model

CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**LLAMA, tie_word_embeddings=True),
    "gptj": GPTJConfig(
        vocab_size=300, n_embd=64, n_layer=2, n_head=4, rotary_dim=8, n_positions=64, bos_token_id=0, eos_token_id=0,
        tie_word_embeddings=True,
    ),
}  # fmt: skip
EMBEDDING = {"llama": "model.embed_tokens.weight", "gptj": "transformer.wte.weight"}
IDS = torch.arange(0, 300, 7)[None]


def tied(folder: Path, family: str, *, head: str, pickled: bool = False) -> Path:
    """A folder with a tied config and a head that is "absent", "equal", "other", "other type" or "alone"."""
    write_model(folder, CONFIGS[family])
    tensors = load_file(folder / "model.safetensors")
    table = tensors[EMBEDDING[family]]
    if head == "other":
        tensors["lm_head.weight"] = table.flip(0) * 0.5
    elif head == "other type":
        tensors["lm_head.weight"] = table.double()
    elif head != "absent":
        tensors["lm_head.weight"] = table.clone()
    if head == "alone":
        del tensors[EMBEDDING[family]]
    if pickled:
        torch.save(tensors, folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    else:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def loaded(folder: Path, scheme: str = "none", *, pickles: bool = False) -> Decoder:
    source = FolderSource(folder, allow_pickle=pickles)
    return load(source, scheme_named(scheme), dtype=torch.float32, device=torch.device("cpu"))


def logits_of_transformers(folder: Path) -> Tensor:
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits: Tensor = theirs(IDS).logits
    return logits


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("head", ["absent", "equal", "other", "other type", "alone"])
def test_logits_equal_those_of_transformers(family: str, head: str, tmp_path: Path) -> None:
    folder = tied(tmp_path / "model", family, head=head)
    model = loaded(folder)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS), logits_of_transformers(folder), rtol=1e-4, atol=1e-4)
    assert model.config.tied is (head != "other")


def test_a_pickle_with_a_separate_head_is_read_like_safetensors(tmp_path: Path) -> None:
    model = loaded(tied(tmp_path / "a", "llama", head="other", pickled=True), pickles=True)
    expected = loaded(tied(tmp_path / "b", "llama", head="other"))
    with torch.no_grad():
        assert torch.equal(model(IDS), expected(IDS))


@pytest.mark.parametrize("scheme", ["none", "int8", "dynamic8", "nf4"])
@pytest.mark.parametrize("head", ["other", "equal", "alone"])
def test_quantize_keeps_a_separate_head(scheme: str, head: str, tmp_path: Path) -> None:
    source = FolderSource(tied(tmp_path / "model", "llama", head=head))
    write_folder(source, tmp_path / "out", scheme_named(scheme))
    written = FolderSource(tmp_path / "out")
    assert written.config["tie_word_embeddings"] is (head != "other")
    with torch.no_grad():
        assert torch.equal(loaded(tmp_path / "out", scheme)(IDS), loaded(source.folder, scheme)(IDS))
    if scheme == "none":
        torch.testing.assert_close(loaded(tmp_path / "out")(IDS), logits_of_transformers(tmp_path / "out"))


def test_a_quantized_head_that_is_called_tied_is_compared_by_quantized_values(tmp_path: Path) -> None:
    """A folder with the config set to tied again, as a script that copies config.json leaves it."""
    write_folder(FolderSource(tied(tmp_path / "model", "llama", head="other")), tmp_path / "out", scheme_named("int8"))
    path = tmp_path / "out" / "config.json"
    path.write_text(path.read_text().replace('"tie_word_embeddings": false', '"tie_word_embeddings": true'))
    assert FolderSource(tmp_path / "out").config["tie_word_embeddings"] is False
