"""GPT-2's config, and the linears that its checkpoints store transposed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.models.families import LENGTH, VOCABULARY, like_gpt2
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config

from octavo.errors import ModelError
from octavo.models import Decoder, build, parse, weight_entries
from octavo.ops.quantize import scheme_named
from octavo.store.sources import FolderSource
from octavo.store.weights import load

ModelsOf = Callable[[Any], tuple[Any, Decoder]]
SIZES = {"model_type": "gpt2", "vocab_size": 97, "n_embd": 48, "n_head": 4, "n_layer": 3}
IDS = torch.arange(LENGTH)[None] % VOCABULARY


def loaded(folder: Path) -> Decoder:
    return load(FolderSource(folder), scheme_named("none"), dtype=torch.float32, device=torch.device("cpu"))


def changed(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Decoder:
    """The model of a folder after a change of its tensors."""
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})
    return loaded(folder)


def test_a_config_that_says_little_has_the_defaults_of_transformers() -> None:
    config = parse(SIZES)
    theirs = GPT2Config()
    assert config.context == theirs.n_positions
    assert config.tied is theirs.tie_word_embeddings
    assert {layer.spec.scale for layer in config.attention} == {12**-0.5}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"add_cross_attention": True}, "asks for add_cross_attention"),
        ({"activation_function": "relu"}, "asks for the activation .relu.; the blocks of GPT-2"),
        ({"n_head": 5}, "n_embd is 48, which n_head 5 does not divide"),
        ({"n_layer": None}, "n_layer is missing"),
    ],
)
def test_what_octavo_does_not_compute_is_an_error(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        build({**SIZES, **config})


def test_the_linears_of_the_blocks_are_transposed_and_no_others(
    models_of: ModelsOf,
) -> None:
    theirs, ours = models_of(GPT2Config(**like_gpt2(4, tie_word_embeddings=False)))
    for entry in weight_entries(ours).values():
        if entry.matrix is not None:
            weight = theirs.get_submodule(entry.module).weight
            assert torch.equal(entry.matrix.parts["weight"], weight.t() if entry.transposed else weight)
            assert entry.transposed is (entry.name not in ("transformer.wte", "lm_head"))


def test_a_weight_that_is_not_transposed_is_an_error(models_of: ModelsOf, tmp_path: Path) -> None:
    name = "transformer.h.1.mlp.c_fc.weight"
    models_of(GPT2Config(**like_gpt2(4)))[0].save_pretrained(tmp_path)
    message = r"mlp\.c_fc\.weight has the shape \(192, 48\), but the model's config\.json makes it \(48, 192\)"
    with pytest.raises(ModelError, match=message):
        changed(tmp_path, lambda tensors: {**tensors, name: tensors[name].t().contiguous()})


def test_buffers_of_older_files_are_ignored(models_of: ModelsOf, tmp_path: Path) -> None:
    theirs, ours = models_of(GPT2Config(**like_gpt2(4)))
    theirs.save_pretrained(tmp_path)
    buffers = {"bias": torch.ones(1, 1, 8, 8), "masked_bias": torch.tensor(-1e9)}
    old = {f"transformer.h.0.attn.{name}": tensor for name, tensor in buffers.items()}
    assert torch.equal(changed(tmp_path, lambda tensors: tensors | old)(IDS), ours(IDS))


def older(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the names of OpenAI's files."""
    return {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}


def test_names_of_older_files_lack_their_first_part(models_of: ModelsOf, tmp_path: Path) -> None:
    theirs, ours = models_of(GPT2Config(**like_gpt2(4)))
    theirs.save_pretrained(tmp_path)
    buffer = {"h.0.attn.bias": torch.ones(1, 1, 8, 8)}
    assert torch.equal(changed(tmp_path, lambda tensors: older(tensors) | buffer)(IDS), ours(IDS))
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(IDS).logits, theirs(IDS).logits)


@pytest.mark.parametrize("names", [older, dict])
def test_a_head_is_tied_unless_the_stored_one_differs(names: Any, models_of: ModelsOf, tmp_path: Path) -> None:
    """Older config.json files do not say whether it is tied. The name of the head is the same in all files."""
    theirs, ours = models_of(GPT2Config(**like_gpt2(4)))
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("tie_word_embeddings", None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    head = theirs.lm_head.weight.detach().clone()
    same = changed(tmp_path, lambda tensors: {**names(tensors), "lm_head.weight": head})
    assert same.config.tied is True
    assert torch.equal(same(IDS), ours(IDS))
    own = changed(tmp_path, lambda tensors: {**tensors, "lm_head.weight": 2 * head})
    assert own.config.tied is False
    torch.testing.assert_close(own(IDS), 2 * ours(IDS))


def test_older_names_that_do_not_fit_are_named_as_in_the_model(models_of: ModelsOf, tmp_path: Path) -> None:
    models_of(GPT2Config(**like_gpt2(4)))[0].save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"lacks transformer\.h\.1\.ln_1\.weight"):
        changed(tmp_path, lambda tensors: older({n: t for n, t in tensors.items() if "h.1.ln_1.weight" not in n}))
