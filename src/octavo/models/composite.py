"""Models of text and images, of which octavo reads the text part.

Their config.json has the text model's settings in `text_config`. transformers names the text part's modules
model.language_model.X and lm_head, and so do PEFT's files; checkpoints have language_model.model.X and
language_model.lm_head. Both forms are read. The tensors of the other parts are left out.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from octavo.models.config_fields import ConfigFields

# The architectures of a config.json, each with its model_type and the default model_type of its text part.
COMPOSITES = {
    "Gemma3ForConditionalGeneration": ("gemma3", "gemma3_text"),
    "Mistral3ForConditionalGeneration": ("mistral3", "mistral"),
}
TEXT_PREFIX = "language_model."  # after "model." in the names of the text part's modules
# The beginnings of names in a checkpoint, and what transformers calls them.
RENAMED = (("language_model.lm_head.", "lm_head."), ("language_model.model.", f"model.{TEXT_PREFIX}"))
STARTS = (TEXT_PREFIX, f"model.{TEXT_PREFIX}")  # of names in a composite model: in older versions, now
OTHER_PARTS = ("vision_tower.", "multi_modal_projector.", "visual.", "audio_tower.", "embed_vision.")


def text_config(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The config of the text part, as a model of its own would have it; None if the model is no composite.

    Whether head and embedding are tied is a setting of the whole model, True by default as in transformers.
    """
    fields = ConfigFields(config)
    known = [COMPOSITES[name] for name in fields.texts("architectures") if name in COMPOSITES]
    model_type = fields.text("model_type", default="")
    known += [types for types in COMPOSITES.values() if types[0] == model_type]
    if not known or (model_type and model_type != known[0][0]):
        return None
    text = fields.object("text_config")
    if text is None:
        raise fields.wrong("text_config is missing")
    tied = fields.flag("tie_word_embeddings", default=True)
    default = {"model_type": known[0][1], "tie_word_embeddings": tied}
    own = {key: value for key, value in text.source.items() if key not in ("architectures", "tie_word_embeddings")}
    # The head of a composite Gemma 3 has no soft-cap in transformers, whatever text_config says.
    return {**default, **own, "final_logit_softcapping": None}


def names_in(config: Mapping[str, Any], stored: Iterable[str]) -> dict[str, str]:
    """The names that the tensors of a checkpoint have in transformers -> those in the file, without other parts."""
    if text_config(config) is None:
        return {name: name for name in stored}
    names = {}
    for name in stored:
        start, new = next(((old, new) for old, new in RENAMED if name.startswith(old)), ("", ""))
        if not is_other_part(name):
            names[new + name.removeprefix(start)] = name
    return names


def is_other_part(name: str) -> bool:
    """Whether a name in a composite model belongs to another part than the text's."""
    return name.removeprefix("model.").startswith(OTHER_PARTS)


def names_in_file(modules: Iterable[str], given: Collection[str]) -> dict[str, str]:
    """The modules of a model -> their names in a file with the names `given`, of PEFT or of octavo.

    A module is model.X in a text model, model.language_model.X in a composite one, and language_model.model.X in a
    composite one of older versions, whose head is language_model.lm_head. All three are read for each of the models,
    since octavo writes the text part of a composite model as a text model.
    """
    start = next((one for one in (*STARTS, "model.") if any(name.startswith(one) for name in given)), None)
    if start is None:
        return {module: module for module in modules}
    return {module: _with_start(module, start) for module in modules}


def _with_start(module: str, start: str) -> str:
    if module.startswith("model."):
        prefix = "language_model.model." if start == STARTS[0] else start
        return prefix + module.removeprefix("model.").removeprefix(TEXT_PREFIX)
    return start + module if start == STARTS[0] else module
