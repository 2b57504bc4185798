"""Checkpoints with the names of a model without its head, which lack the first part.

The embedding of GPT-2 is transformer.wte in a model with a head, and wte in GPT2Model of transformers, which has none.
The files of OpenAI's GPT-2 have the names of the latter.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import Any

from octavo.errors import ModelError
from octavo.models import table_names


def full_names(config: Mapping[str, Any], stored: Collection[str]) -> dict[str, str]:
    """The name of each tensor with the first part that the model's names have -> its name in `stored`.

    They are equal unless the embedding is stored without this part, and where octavo does not support the config.
    """
    with suppress(ModelError):
        embedding, head = table_names(config)
        first, _, rest = embedding.partition(".")
        if f"{rest}.weight" in stored and f"{embedding}.weight" not in stored:
            has_all = (f"{first}.", f"{head}.")
            return {name if name.startswith(has_all) else f"{first}.{name}": name for name in stored}
    return {name: name for name in stored}
