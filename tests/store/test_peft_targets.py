"""The selection of adapter_config.json is that of PEFT, on the names of a model's modules."""

from __future__ import annotations

from typing import Any

import pytest
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists

from octavo.bounded_json import JsonError
from octavo.store.peft_targets import read_targets

LINEARS = [
    f"{blocks}.{layer}.{name}"
    for blocks in ("model.layers", "transformer.h", "model.vision_tower.encoder.layers")
    for layer in (0, 1, 12)
    for name in ("self_attn.q_proj", "attn.q_proj", "self_attn.v_proj", "mlp.c_proj", "attn.c_proj")
]
NAMES = [*LINEARS, "lm_head", "model.embed_tokens"]
SELECTIONS: dict[str, dict[str, Any]] = {
    "last names": {"target_modules": ["q_proj", "lm_head"]},
    "ends": {"target_modules": ["attn.c_proj", "1.mlp.c_proj"]},
    "part of a name": {"target_modules": ["proj", "_head", "lm_head"]},
    "a full name": {"target_modules": ["model.layers.0.self_attn.q_proj"]},
    "an expression": {"target_modules": r".*layers\.\d+\.(self_attn|mlp)\..*"},
    "excluded": {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["attn.q_proj", "lm_head"]},
    "excluded by an expression": {"target_modules": ["q_proj"], "exclude_modules": ".*vision_tower.*"},
    "layers": {"target_modules": ["q_proj", "lm_head"], "layers_to_transform": [0, 12]},
    "one layer": {"target_modules": ["q_proj"], "layers_to_transform": 1},
    "layers of a list": {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "h"},
    "layers of two lists": {
        "target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["h", "layers"],
    },
    "a full name in another layer": {
        "target_modules": ["v_proj", "transformer.h.0.attn.q_proj"], "layers_to_transform": [1],
    },
}  # fmt: skip


@pytest.mark.parametrize("case", SELECTIONS)
def test_the_selected_modules_are_those_of_peft(case: str) -> None:
    config = LoraConfig(**SELECTIONS[case])
    expected = [name for name in NAMES if check_target_module_exists(config, name)]
    targets = read_targets(SELECTIONS[case])
    assert targets is not None
    assert [name for name in NAMES if targets.includes(name, is_block_linear=True)] == expected != []


@pytest.mark.parametrize("value", ["all-linear", "ALL-LINEAR"])
def test_all_linear_is_every_linear_but_the_head(value: str) -> None:
    targets = read_targets({"target_modules": value, "exclude_modules": ["v_proj"]})
    assert targets is not None
    chosen = [name for name in NAMES if targets.includes(name, is_block_linear=name in LINEARS)]
    assert chosen == [name for name in LINEARS if not name.endswith("v_proj")]


@pytest.mark.parametrize("value", [None, [], ""])
def test_a_config_may_select_nothing(value: object) -> None:
    assert read_targets({"target_modules": value}) is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"target_modules": 3}, "target_modules is 3"),
        ({"target_modules": [["q_proj"]]}, "target_modules is a list"),
        ({"target_modules": "(a"}, "target_modules: .*regular expression"),
        ({"exclude_modules": "(?<=a)b"}, "exclude_modules: .*regular expression"),
        ({"exclude_modules": {"a": 1}}, "exclude_modules is an object"),
        ({"layers_to_transform": "all"}, "layers_to_transform is 'all'"),
        ({"layers_to_transform": [0.5]}, "layers_to_transform is a list"),
        ({"layers_pattern": "(.*)*"}, "layers_pattern is"),
    ],
)
def test_a_selection_that_octavo_does_not_read_is_an_error(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(JsonError, match=reason):
        read_targets({"target_modules": ["q_proj"], **changes})
