"""store/peft_names.py: each tensor is one parameter of one module, under PEFT's prefix."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from octavo.errors import AdapterError
from octavo.store.peft_names import PREFIX, TOKENS, Name, parsed

Q = f"{PREFIX}model.layers.0.self_attn.q_proj"
LORA = [f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"]
EMBEDDING = [f"{PREFIX}wte.lora_embedding_A", f"{PREFIX}wte.lora_embedding_B"]
NORM = f"{PREFIX}model.norm"
FOLDER = Path("folder")


def names_of(keys: Sequence[str]) -> dict[str, Name]:
    """The names of a file whose tensors are all different."""
    return parsed(FOLDER, {key: torch.full((2, 2), number) for number, key in enumerate(keys)})


def test_names_of_peft_are_read() -> None:
    tokens, norm, bias = f"{PREFIX}wte{TOKENS}", f"{NORM}.modules_to_save.weight", f"{Q}.base_layer.bias"
    table = f"{PREFIX}wte.token_adapter.base_layer.weight"
    names = names_of([*LORA, *EMBEDDING, tokens, table, norm, f"{NORM}.original_module.weight", bias])
    assert names == {
        LORA[0]: Name("model.layers.0.self_attn.q_proj", "lora_A", LORA[1]),
        LORA[1]: Name("model.layers.0.self_attn.q_proj", "lora_B", LORA[0]),
        EMBEDDING[0]: Name("wte", "lora_embedding_A", EMBEDDING[1]),
        EMBEDDING[1]: Name("wte", "lora_embedding_B", EMBEDDING[0]),
        tokens: Name("wte", "tokens"),
        table: Name("wte", "weight"),
        norm: Name("model.norm", "weight"),
        bias: Name("model.layers.0.self_attn.q_proj", "bias"),
    }


def test_a_module_with_the_name_of_a_matrix_has_its_other_matrix() -> None:
    keys = [f"{PREFIX}lora_A.x.lora_A.weight", f"{PREFIX}lora_A.x.lora_B.weight"]
    assert [name.other for name in names_of(keys).values()] == keys[::-1]


@pytest.mark.parametrize(
    "keys",
    [
        [*LORA, f"{Q}.lora_embedding_A", f"{Q}.lora_embedding_B"],
        [*LORA, f"{Q}.base_layer.bias", f"{Q}.bias"],
        [f"{NORM}.weight", f"{NORM}.modules_to_save.weight"],
        [f"{NORM}.modules_to_save.default.weight", f"{NORM}.modules_to_save.weight"],
    ],
)
def test_two_tensors_of_one_parameter_are_refused_by_their_names(keys: list[str]) -> None:
    """Else one of them would be used, and the other ignored without a message."""
    with pytest.raises(AdapterError, match="twice") as caught:
        names_of(keys)
    assert sum(key in str(caught.value) for key in keys) == 2


def test_an_embedding_that_peft_wrote_twice_is_read() -> None:
    """It does if the vocabulary was resized: by modules_to_save, and by save_embedding_layers."""
    keys = [f"{PREFIX}lm_head.weight", f"{PREFIX}lm_head.modules_to_save.weight"]
    assert list(parsed(FOLDER, dict.fromkeys(keys, torch.ones(2, 2))).values()) == [Name("lm_head", "weight")] * 2


@pytest.mark.parametrize("removed", [LORA, EMBEDDING, [f"{NORM}.weight"]])
def test_names_without_the_prefix_are_refused(removed: list[str]) -> None:
    """PEFT ignores these tensors with a warning: the model has the base's output."""
    keys = [key.removeprefix(PREFIX) if key in removed else key for key in (*LORA, *EMBEDDING, f"{NORM}.weight")]
    with pytest.raises(AdapterError, match="prefix") as caught:
        names_of(keys)
    assert removed[0].removeprefix(PREFIX) in str(caught.value)
    assert PREFIX in caught.value.hint


@pytest.mark.parametrize(
    "keys",
    [
        [f"{PREFIX}.lora_A.weight", f"{PREFIX}.lora_B.weight"],
        [PREFIX + TOKENS],
        [f"{PREFIX}.weight"],
        [PREFIX],
    ],
)
def test_a_tensor_without_a_module_is_refused(keys: list[str]) -> None:
    with pytest.raises(AdapterError, match="does not read"):
        names_of([*LORA, *keys])
