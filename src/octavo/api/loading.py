"""`octavo.load`: a model with its tokenizer in this process."""

from __future__ import annotations

from typing import TYPE_CHECKING

from octavo.api.options import with_options
from octavo.config import Config, GenerateOptions, ModelOptions
from octavo.reporting import Report

if TYPE_CHECKING:
    from octavo.api.language_model import LanguageModel


@with_options((ModelOptions, GenerateOptions), positional="model")
def load(config: Config, quiet: bool) -> LanguageModel:
    """Loads a model, with an adapter applied if one is given, to generate and to measure in this process.

    The options of generation are the defaults of `LanguageModel.generate`.
    """
    from octavo.api.language_model import LanguageModel
    from octavo.commands.generate import open_model

    with Report(console=not quiet) as report:
        loaded = open_model(config, report)
    return LanguageModel(loaded.model, loaded.tokenizer, loaded.stop_ids, config[GenerateOptions])
