"""Adapters of PEFT with full weights, resized vocabularies, trained tokens and biases give the same logits here."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tests.store.full_adapters import CASES, TOLERANCE, Written, base_of, logits, model_of
from torch import Tensor

from octavo.adapters import apply_, save
from octavo.adapters.served import serve_
from octavo.errors import AdapterError
from octavo.layers.multi_lora import ServedAdapters
from octavo.models import WeightEntry, weight_entries
from octavo.ops.quantize import dequantize, scheme_named
from octavo.store.peft import TENSORS, Adapter, read
from octavo.store.sources import FolderSource

pytestmark = [
    # peft 0.21 and the torch that it calls.
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
    pytest.mark.filterwarnings("ignore:You passed `ensure_weight_tying=True`:UserWarning"),
]


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_with_full_weights_gives_pefts_logits(
    case: str, families: dict[str, Path], written: Written
) -> None:
    folder, theirs = written(case)
    model = model_of(families[CASES[case][0]])
    untouched = logits(model)
    apply_(model, read(folder))
    ours = logits(model)
    assert ours.shape == theirs.shape
    assert model.config.vocabulary == theirs.shape[-1]
    assert untouched.shape != theirs.shape or (theirs - untouched).abs().max() > 0.1
    assert (theirs - ours).abs().max() <= TOLERANCE


SAVED = (
    "both", "linears", "all biases", "resized and trained", "resized embedding with LoRA", "tokens resized",
    "tied head", "tied resized embedding", "gptj q", "some biases",
)  # fmt: skip


@pytest.mark.parametrize(
    "case", [case if case in SAVED else pytest.param(case, marks=pytest.mark.exhaustive) for case in CASES]
)
def test_saving_an_adapter_again_keeps_its_full_weights(
    case: str, families: dict[str, Path], written: Written, tmp_path: Path
) -> None:
    folder, expected = written(case)
    family, options = CASES[case]
    model = model_of(families[family])
    plan = apply_(model, read(folder))
    save(tmp_path / "ours", model, plan, base=str(families[family]), origin={}, readme="")
    again = model_of(families[family])
    apply_(again, read(tmp_path / "ours"))
    assert torch.equal(logits(again), logits(model))
    ours, theirs = (load_file(path / TENSORS).keys() for path in (tmp_path / "ours", folder))
    assert ours >= {key for key in theirs if ".modules_to_save." not in key and ".original_module." not in key}
    peft = PeftModel.from_pretrained(base_of(families[family], options.get("resize")), tmp_path / "ours")
    assert (logits(peft) - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize("scheme", ["int8", "nf4", "nf4-double"])
@pytest.mark.parametrize("case", ["both", "linears", "tied head", "tied embedding", "tied tokens", "gptj q"])
def test_only_trained_weights_are_unquantized_under_a_scheme(
    case: str, scheme: str, families: dict[str, Path], written: Written
) -> None:
    """They replace rows of the dequantized matrix; all other rows are unchanged."""
    folder, adapter = families[CASES[case][0]], read(written(case)[0])
    before, after = weight_entries(model_of(folder, scheme)), model_of(folder, scheme)
    apply_(after, adapter)
    for name, entry in weight_entries(after).items():
        if entry.matrix is None:
            continue
        actual, expected = dequantized(entry), adapter.full.get(f"{name}.weight", dequantized(before[name]))
        for tokens, (indices, rows) in adapter.tokens.items():
            if tokens == name or before[tokens].matrix is before[name].matrix:
                expected[list(indices)] = rows
        assert torch.equal(actual, expected), name


def dequantized(entry: WeightEntry) -> Tensor:
    assert entry.matrix is not None
    shape = entry.matrix.outputs[entry.rows_key], entry.matrix.in_features
    return dequantize(entry.matrix.scheme, entry.matrix.of(entry.rows_key), shape).clone()


@pytest.mark.parametrize("scheme", ["none", "int8", "nf4"])
@pytest.mark.parametrize("case", ["saved along", "tied saved along"])
def test_weights_equal_to_the_base_are_ignored(
    case: str, scheme: str, families: dict[str, Path], written: Written
) -> None:
    """So such adapters can be served next to others, and embedding and head keep their scheme."""
    model, adapter = model_of(families[CASES[case][0]], scheme), read(written(case)[0])
    assert [key for key in adapter.full if "embed" in key]
    adapters = ServedAdapters()
    serve_(model, adapters, adapter, "new")
    assert adapters.ids
    alone = model_of(families[CASES[case][0]], scheme)
    apply_(alone, adapter)
    assert alone.embed.matrix.scheme.name == scheme_named(scheme).embedding_scheme
    assert alone.config == model.config


@pytest.mark.parametrize("scheme", ["none", "int8", "nf4", "nf4-double"])
def test_a_linear_equal_to_the_base_keeps_its_scheme(scheme: str, families: dict[str, Path], written: Written) -> None:
    folder, name = families["llama"], "model.layers.1.mlp.up_proj"
    weight, adapter = FolderSource(folder).tensor(f"{name}.weight"), read(written("linears")[0])
    for changed in (False, True):
        model = model_of(folder, scheme)
        # Without a config: it would select weights that this adapter lacks.
        full = {f"{name}.weight": weight.clone().mul_(2 if changed else 1)}
        apply_(model, replace(adapter, full=full, config=None))
        matrix = weight_entries(model)[name].matrix
        assert matrix is not None
        assert matrix.scheme.name == ("none" if changed else scheme)


@pytest.mark.parametrize("case", ["head", "resized", "tokens", "some biases", "gptj q", "tied embedding"])
def test_weights_that_all_sequences_share_cannot_be_served(
    case: str, families: dict[str, Path], written: Written
) -> None:
    model, adapters = model_of(families[CASES[case][0]]), ServedAdapters()
    before = logits(model)
    with pytest.raises(AdapterError, match="only LoRA can be served") as caught:
        serve_(model, adapters, read(written(case)[0]), "new")
    assert "generate --adapter" in caught.value.hint
    assert not adapters.ids
    assert torch.equal(logits(model), before)


def changed(folder: Path, out: Path, change: Callable[[str, Tensor], Tensor | None]) -> Adapter:
    """An adapter with other tensors, or without some."""
    shutil.copytree(folder, out)
    tensors = {key: change(key, tensor) for key, tensor in load_file(folder / TENSORS).items()}
    save_file({key: tensor for key, tensor in tensors.items() if tensor is not None}, out / TENSORS)
    return read(out)


MISFITS: dict[str, tuple[str, str, str]] = {  # case, removed part, message
    "one table": ("resized", "lm_head", "embedding has 310 rows and the head 300"),
    "a head without its bias": ("gptj resized", "lm_head.bias", "head has 310 rows, and no bias"),
    "tokens": ("tokens resized", "m.weight|layer.weight|lm_head", "the last of which is 305"),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_a_resized_vocabulary_saved_only_in_part_is_an_error(
    misfit: str, families: dict[str, Path], written: Written, tmp_path: Path
) -> None:
    case, missing, message = MISFITS[misfit]
    adapter = changed(written(case)[0], tmp_path / "x", lambda key, t: None if re.search(missing, key) else t)
    with pytest.raises(AdapterError, match=message):
        apply_(model_of(families[CASES[case][0]]), adapter)


def test_weights_too_large_for_the_compute_type_are_an_error(
    families: dict[str, Path], written: Written, tmp_path: Path
) -> None:
    adapter = changed(written("head")[0], tmp_path / "x", lambda key, t: t * 1e6 if "lm_head" in key else t)
    with pytest.raises(AdapterError, match=r"lm_head\.weight holds values that are too large for torch.float16"):
        apply_(model_of(families["llama"], dtype=torch.float16), adapter)
