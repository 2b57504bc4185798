"""Adapters that a server applies per request: A and B in the banks of the layers (layers/multi_lora.py)."""

from __future__ import annotations

from octavo.adapters.matching import check_shapes, frozen_layer, lora_for, matched
from octavo.bounded_json import some
from octavo.errors import AdapterError
from octavo.layers.frozen import FrozenEmbedding, FrozenLinear
from octavo.layers.multi_lora import AdapterBank, ServedAdapters
from octavo.models import Decoder
from octavo.store.full_weights import changed_keys
from octavo.store.peft import Adapter


def serve_(model: Decoder, served: ServedAdapters, adapter: Adapter, name: str) -> None:
    """Adds an adapter to the served ones under `name`. Each request selects its adapter by its id in `served`.

    AdapterError if the model has no module for a tensor, or if a norm, a bias or a full weight differs from the
    model's: all sequences of a batch share those.
    """
    entries, adapter = matched(model, adapter)
    if changed := changed_keys(adapter, entries):
        raise AdapterError(
            f"The adapter {name} has trained norms, biases or full weights ({some(changed)}); only LoRA can be "
            "served next to other adapters.",
            hint="Use `octavo generate --adapter`, or merge it into its base with `octavo merge` and serve that. An "
            "adapter trained without --train-norms, --train-biases and modules_to_save can be served.",
        )
    check_shapes(entries, adapter)
    loras = {module: lora_for(entries[module], adapter) for module in adapter.lora}
    before = _bank_addresses(model)
    _take_off_(model, served, name)
    adapter_id = served.free_id()
    for module, lora in loras.items():
        layer = frozen_layer(entries[module])
        if layer.bank is None:
            layer.bank = _new_bank(layer)
        layer.bank.put(adapter_id, entries[module].rows_key, lora.a.detach(), lora.b.detach(), lora.scaling)
    for layer in _frozen_layers(model):
        if layer.bank is not None:
            # Every bank is indexed with this id, also the banks of layers that this adapter does not adapt.
            layer.bank.reserve(adapter_id + 1)
    served.ids[name] = adapter_id
    served.changes += _bank_addresses(model) != before


def remove_(model: Decoder, served: ServedAdapters, name: str) -> None:
    """Removes a served adapter."""
    before = _bank_addresses(model)
    _take_off_(model, served, name)
    served.changes += _bank_addresses(model) != before


def _take_off_(model: Decoder, served: ServedAdapters, name: str) -> None:
    adapter_id = served.ids.pop(name, None)
    if adapter_id is None:
        return
    for layer in _frozen_layers(model):
        if layer.bank is not None:
            layer.bank.clear(adapter_id)
        if not served.ids:
            layer.bank = None


def _bank_addresses(model: Decoder) -> list[object]:
    """Addresses and shapes of all banks' tensors. Captured CUDA graphs hold them and are invalid if one changes."""
    banks = [layer.bank for layer in _frozen_layers(model)]
    return [bank and (bank.a.data_ptr(), bank.a.shape, bank.b.data_ptr(), bank.b.shape) for bank in banks]


def _frozen_layers(model: Decoder) -> list[FrozenLinear | FrozenEmbedding]:
    return [module for module in model.modules() if isinstance(module, FrozenLinear | FrozenEmbedding)]


def _new_bank(layer: FrozenLinear | FrozenEmbedding) -> AdapterBank:
    matrix = layer.matrix
    if isinstance(layer, FrozenEmbedding):  # A (r, V), B (d, r): the input of an embedding is a row index
        return AdapterBank(
            matrix.shape[0], dict.fromkeys(matrix.outputs, matrix.in_features), matrix.dtype, matrix.device
        )
    return AdapterBank(matrix.in_features, matrix.outputs, matrix.dtype, matrix.device)
