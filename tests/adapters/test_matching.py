"""The adapter of a composite model on its text part as a model of its own, and the reverse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.families.adapters import TENSORS, with_octavo, with_peft
from tests.families.models import CONFIGS, SHAPE, Family, logits
from tests.infer.conftest import _write_model
from tests.models.families import GROWTH, YARN, composite
from transformers import AutoModelForCausalLM, Mistral3Config

from octavo.adapters import apply_
from octavo.errors import AdapterError
from octavo.ops.quantize import scheme_named
from octavo.store.hf_folder import write_folder
from octavo.store.peft import read
from octavo.store.sources import FolderSource

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning"),  # peft 0.21
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
]
WHOLE: dict[str, Any] = {
    "gemma3": CONFIGS["gemma3"],
    "mistral3": CONFIGS["mistral3"],
    "mistral3 of ministral3": composite(
        Mistral3Config, "pixtral", model_type="ministral3", head_dim=16, rope_parameters=YARN | GROWTH, **SHAPE
    ),
}
# Of PEFT. A regular expression selects whole names, which those of the other model differ from.
SELECTED: dict[str, dict[str, Any]] = {
    "all-linear": {},
    "names, a norm in full": {"target_modules": ["q_proj", "down_proj"], "modules_to_save": ["input_layernorm"]},
    "an expression": {"target_modules": r"{prefix}layers\.\d+\.self_attn\.[qv]_proj", "exclude_modules": None},
    "an expression to exclude": {
        "target_modules": ["q_proj"],
        "exclude_modules": r"{prefix}layers\.0\..*|.*vision_tower.*",
    },
}
PREFIXES = {"whole": r"model\.language_model\.", "text": r"model\."}


@pytest.fixture(scope="module", params=WHOLE)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Family]:
    """A composite model, and the folder of its text part that `octavo quantize --scheme none` writes."""
    root = tmp_path_factory.mktemp("pair")
    theirs, tokenizer = _write_model(root / "whole", WHOLE[request.param])
    tokenizer.save_pretrained(root / "whole")
    write_folder(FolderSource(root / "whole"), root / "text", scheme_named("none"))
    text = AutoModelForCausalLM.from_pretrained(root / "text", dtype=torch.float32, attn_implementation="eager").eval()
    return {
        "whole": Family("whole", root / "whole", theirs, tokenizer),
        "text": Family("text", root / "text", text, tokenizer),
    }


def options_of(selected: str, side: str) -> dict[str, Any]:
    """The options of PEFT, with the names of one side."""
    return {
        key: value.replace("{prefix}", PREFIXES[side]) if isinstance(value, str) else value
        for key, value in SELECTED[selected].items()
    }


@pytest.mark.parametrize("selected", SELECTED)
@pytest.mark.parametrize(("side", "other"), [("whole", "text"), ("text", "whole")])
def test_an_adapter_of_peft_fits_the_composite_model_and_its_text_part(
    pair: dict[str, Family], side: str, other: str, selected: str, tmp_path: Path
) -> None:
    expected = logits(with_peft(pair[side], tmp_path / "adapter", **options_of(selected, side)))
    assert not torch.allclose(expected, logits(pair[side].theirs), atol=1e-2)
    for one in (side, other):
        ours = pair[one].ours()
        apply_(ours, read(tmp_path / "adapter"))
        torch.testing.assert_close(logits(ours), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("side", "other"), [("whole", "text"), ("text", "whole")])
def test_an_adapter_of_octavo_fits_the_composite_model_and_its_text_part(
    pair: dict[str, Family], side: str, other: str, tmp_path: Path
) -> None:
    expected = logits(with_octavo(pair[side], tmp_path))
    ours = pair[other].ours()
    apply_(ours, read(tmp_path))
    torch.testing.assert_close(logits(ours), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("one", PREFIXES)
def test_an_adapter_with_the_names_of_older_versions_fits_both(
    pair: dict[str, Family], one: str, tmp_path: Path
) -> None:
    """Those named the text part language_model.model.X, and its head language_model.lm_head."""
    options = {"target_modules": ["q_proj", "lm_head"]}
    expected = logits(with_peft(pair["whole"], tmp_path, **options))
    tensors = load_file(tmp_path / TENSORS)
    old = {
        key.replace("model.language_model.", "language_model.model.").replace(
            "l.lm_head", "l.language_model.lm_head"
        ): one
        for key, one in tensors.items()
    }
    assert len(old.keys() - tensors.keys()) == len(old)
    save_file(old, tmp_path / TENSORS)
    ours = pair[one].ours()
    apply_(ours, read(tmp_path))
    torch.testing.assert_close(logits(ours), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("side", "other"), [("whole", "text"), ("text", "whole")])
def test_an_incomplete_adapter_is_refused_by_both(
    pair: dict[str, Family], side: str, other: str, tmp_path: Path
) -> None:
    with_peft(pair[side], tmp_path, **options_of("an expression", side))
    tensors = {key: one for key, one in load_file(tmp_path / TENSORS).items() if ".1.self_attn.v_proj" not in key}
    save_file(tensors, tmp_path / TENSORS)
    for one in (side, other):
        with pytest.raises(AdapterError, match=r"incomplete: .*layers\.1\.self_attn\.v_proj"):
            apply_(pair[one].ours(), read(tmp_path))


@pytest.mark.parametrize("one", PREFIXES)
def test_an_adapter_of_the_vision_part_too_is_refused_by_both(
    pair: dict[str, Family], one: str, tmp_path: Path
) -> None:
    with_peft(pair["whole"], tmp_path, target_modules=["q_proj"], exclude_modules=None)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == ["q_proj"]
    with pytest.raises(AdapterError, match=r"tensors outside the text part of the model: .*vision_tower"):
        apply_(pair[one].ours(), read(tmp_path))


@pytest.mark.parametrize("one", PREFIXES)
def test_two_names_of_one_module_are_refused_by_both(pair: dict[str, Family], one: str, tmp_path: Path) -> None:
    """The name in the composite model, and that in its text part as a model of its own."""
    with_peft(pair["whole"], tmp_path, target_modules=["q_proj"])
    tensors = load_file(tmp_path / TENSORS)
    again = {key.replace("language_model.", ""): 9 * one for key, one in tensors.items() if ".layers.0." in key}
    assert again.keys().isdisjoint(tensors)
    save_file({**tensors, **again}, tmp_path / TENSORS)
    with pytest.raises(AdapterError, match=r"(twice:|no module for) model\.(language_model\.)?layers\.0\..*q_proj"):
        apply_(pair[one].ours(), read(tmp_path))
