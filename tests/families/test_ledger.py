"""All modules that an adapter is attached to are listed; an adapter that lacks a tensor or has another is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.families.adapters import TENSORS, with_octavo, with_peft
from tests.families.models import Family, each_family, logits
from torch import Tensor

from octavo.adapters import apply_, attached
from octavo.errors import AdapterError
from octavo.layers.frozen import FrozenEmbedding, FrozenLinear, Lora
from octavo.models import weight_entries
from octavo.store.peft import PREFIX, read

pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning"),  # peft 0.21
]
Tensors = dict[str, Tensor]


def foreign(family: Family) -> Path:
    """An adapter of PEFT on all linears of the blocks."""
    if "foreign" not in family.cached:
        with_peft(family, family.folder / "foreign")
        family.cached["foreign"] = family.folder / "foreign"
    return Path(family.cached["foreign"])


def changed(source: Path, out: Path, change: Callable[[Tensors], Tensors]) -> Path:
    """A copy of an adapter's folder whose tensors are changed."""
    shutil.copytree(source, out)
    save_file({key: t.contiguous() for key, t in change(load_file(out / TENSORS)).items()}, out / TENSORS)
    return out


def last_pair(tensors: Tensors) -> tuple[str, str]:
    """The names of A and B of one linear: of the last layer."""
    key = max(key for key in tensors if key.endswith("lora_A.weight"))
    return key, key.replace("lora_A", "lora_B")


def without_a_pair(tensors: Tensors) -> Tensors:
    return {key: tensor for key, tensor in tensors.items() if key not in last_pair(tensors)}


def misspelt(tensors: Tensors) -> Tensors:
    wrong = {key: key.replace(".lora_", "s.lora_") for key in last_pair(tensors)}
    return {wrong.get(key, key): tensor for key, tensor in tensors.items()}


def with_another_layer(tensors: Tensors) -> Tensors:
    more = {key.replace(".1.", ".9."): tensors[key].clone() for key in last_pair(tensors)}
    return {**tensors, **more}


def with_fewer_rows(tensors: Tensors) -> Tensors:
    _, b = last_pair(tensors)
    return {**tensors, b: tensors[b][:-1]}


def with_fewer_inputs(tensors: Tensors) -> Tensors:
    a, _ = last_pair(tensors)
    return {**tensors, a: tensors[a][:, :-1]}


@pytest.mark.cell("ledger")
@each_family
def test_an_adapter_of_peft_is_complete_and_one_with_another_tensor_is_refused(family: Family, tmp_path: Path) -> None:
    whole = load_file(foreign(family) / TENSORS)
    model = family.ours()
    adapter = read(foreign(family))
    apply_(model, adapter)
    assert sum(attached(adapter).values()) == len(whole) // 2
    module = last_pair(whole)[0].removeprefix(PREFIX).removesuffix(".lora_A.weight")
    head = next(entry for entry in weight_entries(model).values() if entry.is_head)
    assert head.matrix is not None
    columns = head.matrix.in_features

    def with_the_head(tensors: Tensors) -> Tensors:
        start = f"{PREFIX}{head.module}.lora_"
        pair = {f"{start}A.weight": torch.ones(4, columns), f"{start}B.weight": torch.ones(264, 4)}
        return {**tensors, **pair}

    refused: dict[Callable[[Tensors], Tensors], str] = {
        without_a_pair: f"incomplete: its tensors lack what adapter_config.json selects: {module}.",
        misspelt: f"no module for {module}s .* there is one for its other tensors.(.|\n)*This model has {module}[.]",
        with_another_layer: "no module for .*9.*has 2 layers",
        with_the_head: f"does not select: {head.module}",
        with_fewer_rows: f"the LoRA matrix {module}.lora_B is .*, not ",
        with_fewer_inputs: f"the LoRA matrix {module}.lora_A is .*, not ",
    }
    for change, reason in refused.items():
        folder = changed(foreign(family), tmp_path / change.__name__, change)
        with pytest.raises(AdapterError, match=reason) as caught:
            apply_(family.ours(), read(folder))
        assert str(folder) in caught.value.message
        assert caught.value.hint
        assert "hash" not in str(caught.value)


@pytest.mark.cell("ledger")
@each_family
def test_all_modules_of_octavos_adapter_are_listed_and_each_changes_the_logits(family: Family, tmp_path: Path) -> None:
    saved = with_octavo(family, tmp_path / "adapter")
    model = family.ours()
    apply_(model, read(tmp_path / "adapter"))
    expected = logits(model)
    assert torch.equal(expected, logits(saved))
    listed = json.loads((tmp_path / "adapter" / "octavo.json").read_text())["targets"]
    names = {entry.module: entry for entry in weight_entries(model).values()}
    assert listed == {
        name: {"rank": 4, "scaling": 1.5}
        for name, entry in names.items()
        if isinstance(entry.layer, FrozenLinear) and not entry.is_head
    }
    for name in listed:
        layer = names[name].layer
        assert isinstance(layer, FrozenLinear | FrozenEmbedding)
        lora = layer.lora[names[name].rows_key]
        assert isinstance(lora, Lora)
        before = lora.b.data.clone()
        lora.b.data.zero_()
        assert (logits(model) - expected).abs().max() > 1e-3, name
        lora.b.data.copy_(before)
    assert torch.equal(logits(model), expected)


def orders(rows: int) -> Iterator[Tensor]:
    """Other orders of rows: [q|k|v] of each head after each other in place of all q, all k, all v; and the reverse."""
    yield torch.arange(rows).reshape(2, -1).t().reshape(-1)
    yield torch.arange(rows).flip(0)


def with_rows_in(tensors: Tensors, *, key: str, order: Tensor) -> Tensors:
    return {**tensors, key: tensors[key][order]}


@pytest.mark.cell("ledger")
@each_family
def test_an_adapter_of_octavo_whose_rows_have_another_order_is_refused(family: Family, tmp_path: Path) -> None:
    with_octavo(family, tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / TENSORS)
    _, b = last_pair(tensors)
    for number, order in enumerate(orders(len(tensors[b]))):
        moved = changed(tmp_path / "adapter", tmp_path / str(number), partial(with_rows_in, key=b, order=order))
        with pytest.raises(AdapterError, match=f"changed since it was written.* other values or another shape in {b}"):
            read(moved)
    for change in (without_a_pair, misspelt, with_another_layer):
        folder = changed(tmp_path / "adapter", tmp_path / change.__name__, change)
        name = (set(load_file(folder / TENSORS)) ^ set(tensors)).pop()
        with pytest.raises(AdapterError, match=f"changed since it was written.*{name}"):
            read(folder)
        origin = json.loads((folder / "octavo.json").read_text())
        del origin["sha256"]
        (folder / "octavo.json").write_text(json.dumps(origin))
        with pytest.raises(AdapterError, match=r"does not have the LoRA that octavo\.json lists"):
            read(folder)
