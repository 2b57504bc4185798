"""octavo: fine-tune a large language model on your own text files, measured and yours.

The functions are the commands of `octavo`, with the same options: help(octavo.finetune) lists them. They are imported
at their first use.
"""

from typing import TYPE_CHECKING, Any

from octavo._version import __version__
from octavo.errors import (
    AdapterError,
    CheckpointError,
    DataError,
    ModelError,
    OctavoError,
    StoppedError,
    TimeLimitError,
    TrainingError,
    UnknownOptionError,
    UsageError,
)

if TYPE_CHECKING:
    from octavo.api import (
        Run,
        combine_adapters,
        compare,
        convert,
        diff_adapters,
        evaluate,
        export,
        finetune,
        generate,
        list_runs,
        load,
        merge,
        plan,
        push,
        quantize,
        serve,
        show_adapter,
        tune,
    )
    from octavo.api.language_model import LanguageModel

__all__ = [
    "AdapterError",
    "CheckpointError",
    "DataError",
    "LanguageModel",
    "ModelError",
    "OctavoError",
    "Run",
    "StoppedError",
    "TimeLimitError",
    "TrainingError",
    "UnknownOptionError",
    "UsageError",
    "__version__",
    "combine_adapters",
    "compare",
    "convert",
    "diff_adapters",
    "evaluate",
    "export",
    "finetune",
    "generate",
    "list_runs",
    "load",
    "merge",
    "plan",
    "push",
    "quantize",
    "serve",
    "show_adapter",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name == "LanguageModel":
        from octavo.api.language_model import LanguageModel

        return LanguageModel
    if name in __all__:
        from octavo import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
