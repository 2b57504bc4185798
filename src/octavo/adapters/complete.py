"""Whether an adapter has exactly the tensors that its adapter_config.json asks for in a model.

PEFT adapts the modules of the model that the config selects. A file that lacks one of them would be applied in part,
and one that has more was made with another config: both are refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from octavo.bounded_json import JsonError, some
from octavo.errors import AdapterError
from octavo.layers.frozen import FrozenEmbedding
from octavo.models import WeightEntry, layer_of
from octavo.store.peft import Adapter
from octavo.store.peft_config import CONFIG, PeftConfig
from octavo.store.peft_targets import Targets

Entries = Mapping[str, WeightEntry]  # the weight map by names in the checkpoint, which the adapter's tensors have too


def check_complete(entries: Entries, adapter: Adapter, in_file: Mapping[str, str]) -> None:
    """AdapterError that names modules which adapter_config.json targets and the tensors lack, or the reverse.

    Nothing is checked if the adapter was not read from a folder. All modules of the tensors exist in `entries`.
    `in_file` are the names of the modules in the file, which the config has too.
    """
    config = adapter.config
    if config is None:
        return
    try:
        missing, extra = _compared(entries, adapter, config, in_file)
    except JsonError as error:  # of a regular expression
        raise AdapterError(
            f"The {CONFIG} of the adapter is not usable: {error}.",
            hint=f"Write the modules' names into {CONFIG}, a list in place of the expression.",
        ) from error
    if missing:
        raise AdapterError(
            f"{adapter.named} is incomplete: its tensors lack what {CONFIG} selects: {some(missing)}.",
            hint="Was the file cut, or made for another model? Restore it, or select only what it has.",
        )
    if extra:
        raise AdapterError(
            f"{adapter.named} has LoRA that {CONFIG} does not select: {some(extra)}.",
            hint=f"Select these modules in {CONFIG}, or remove their tensors.",
        )


def _compared(
    entries: Entries, adapter: Adapter, config: PeftConfig, in_file: Mapping[str, str]
) -> tuple[list[str], list[str]]:
    """(what the tensors lack, the LoRA that is not selected), by names in transformers."""
    missing = [*_missing_saved(entries, adapter, config, in_file), *_missing_biases(entries, adapter, config)]
    extra = []
    for entry in entries.values():
        if entry.matrix is None:
            continue
        has, names = entry.name in adapter.lora, _names(entry, in_file)
        selected = has if config.targets is None else _selected(entry, names, config.targets)
        other = any(map(config.saves, names)) or config.indices_of(in_file[entry.module]) is not None
        if selected and not has and not other:
            missing.append(entry.module)
        if has and (not selected or (entry.name in adapter.embeddings) is not isinstance(entry.layer, FrozenEmbedding)):
            extra.append(entry.module)
    return missing, extra


def _names(entry: WeightEntry, in_file: Mapping[str, str]) -> set[str]:
    """The names that the config may have for a module: that of the file, and that of the checkpoint if it differs."""
    return {in_file[entry.module]} | ({entry.name} if entry.name != entry.module else set())


def _selected(entry: WeightEntry, names: set[str], targets: Targets) -> bool:
    """Whether the config selects a module for LoRA."""
    linear = entry.is_linear and not entry.is_head
    return any(targets.includes(name, is_block_linear=linear) for name in names)


def _missing_saved(entries: Entries, adapter: Adapter, config: PeftConfig, in_file: Mapping[str, str]) -> Iterator[str]:
    """The weights and biases of modules_to_save, and the trained tokens, that the tensors lack."""
    embeddings = [entry for entry in entries.values() if entry.matrix is not None and entry.is_embedding]
    tied = len({id(entry.matrix) for entry in embeddings}) == 1
    either = tied and any(f"{entry.name}.weight" in adapter.full for entry in embeddings)  # PEFT may write one of them
    for entry in entries.values():
        if any(map(config.saves, _names(entry, in_file))):
            for kind in ("weight", "bias"):
                has = f"{entry.name}.{kind}" in adapter.full
                owed = entry.parameter(kind) is not None or (kind == "weight" and entry.matrix is not None)
                if owed and not has and not (either and entry.is_embedding and kind == "weight"):
                    yield f"{entry.module}.{kind}"
        elif config.indices_of(in_file[entry.module]) is not None and not (tied and entry.is_head):
            yield from [] if entry.name in adapter.tokens else [f"the trained tokens of {entry.module}"]


def _missing_biases(entries: Entries, adapter: Adapter, config: PeftConfig) -> Iterator[str]:
    """The biases that the config says are trained, and the tensors lack."""
    if config.bias not in ("all", "lora_only"):
        return
    for entry in entries.values():
        owed = config.bias == "all" or entry.name in adapter.lora
        if owed and entry.parameter("bias") is not None and f"{entry.name}.bias" not in adapter.full:
            yield f"{entry.module}.bias"


def attached(adapter: Adapter) -> dict[str, int]:
    """How many modules of each last name an adapter has LoRA on, e.g. {"q_proj": 30, "v_proj": 30}."""
    names = [name.rpartition(".")[2] for name in adapter.lora]
    return {name: names.count(name) for name in sorted(set(names))}


def attached_text(adapter: Adapter) -> str:
    """`attached` as a sentence, and how many norms, biases and full weights the adapter sets."""
    text = f"The adapter has LoRA on {len(adapter.lora):,} module{'s' if len(adapter.lora) != 1 else ''}"
    if adapter.lora:
        layers = {layer_of(name) for name in adapter.lora} - {None}
        text += f" of {len(layers):,} layers" if len(layers) > 1 else ""
        text += f": {', '.join(attached(adapter))}"
    others = len(adapter.full) - len(adapter.base_layers) + len(adapter.tokens)
    return text + (f"; it sets {others:,} norms, biases or full weights." if others else ".")
