"""The model card (README.md) of a combined adapter: what it was made from."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import yaml

from octavo._version import __version__
from octavo.commands.model_card import is_hub_id, public_name


@dataclass(frozen=True)
class ParentAdapter:
    """An adapter of the sum: its name, its weight, and the SHA-256 of its tensors' file."""

    name: str
    weight: float
    sha256: str

    def to_dict(self) -> dict[str, Any]:
        """The JSON object."""
        return asdict(self)


def combined_readme(
    base: str,
    base_sha256: str | None,
    parents: Sequence[ParentAdapter],
    *,
    ranks: Collection[int],
    error: float,
    licence: str = "",
) -> str:
    """The text of README.md, with the metadata block that the hub reads. `error` is the relative one of the SVD."""
    name = public_name(base) if base else "a base that it does not name"
    metadata: dict[str, Any] = {"base_model": name} if is_hub_id(name) else {}
    metadata |= {"library_name": "peft", "pipeline_tag": "text-generation", "tags": ["lora", "octavo"]}
    if licence:
        metadata["license"] = licence
    rows = [f"| {' '.join(one.name.replace('|', '/').split())} | {one.weight:g} | `{one.sha256}` |" for one in parents]
    size = f"LoRA of rank {max(ranks)}" if ranks else "No LoRA"
    how = "cut to this rank by SVD; the norm of what was cut off is " + f"{100 * error:.3g} % of that of the sum"
    parts = [
        f"---\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)}---",
        f"# Combined LoRA adapter for {name}",
        f"Made by octavo {__version__} with `octavo adapters combine`: the weighted sum of the adapters below.",
        "| adapter | weight | SHA-256 of adapter_model.safetensors |\n|---|---|---|\n" + "\n".join(rows),
        f"{size}: {how if error else 'the sum is exact, up to the rounding of float32'}.",
        f"Base weights, SHA-256: {f'`{base_sha256}`' if base_sha256 else 'not known for all of the adapters'}.",
        "## Limits\n\nThe sum was not measured here: measure it with `octavo evaluate --adapter THIS_FOLDER`. The "
        "results of its parts say little about it. "
        + ("" if licence else "The licence of the base is not recorded here; its terms apply to the adapter. "),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"
