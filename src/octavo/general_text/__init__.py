"""A small general English text, written for octavo, on which `octavo finetune` measures what a model forgets.

Its documents are short and of many kinds: explanations, stories, dialogue, letters, recipes, arithmetic, tables and
code. No user's text should resemble it, so a higher loss on it shows what the training took from the model.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

SEPARATOR = "\n---\n"


@cache
def general_documents() -> tuple[str, ...]:
    """The documents in order."""
    text = Path(__file__).with_name("documents.txt").read_text("utf-8")
    return tuple(document.strip("\n") for document in text.split(SEPARATOR))
