"""octavo: fine-tune a large language model on your own text files, measured and yours."""

from octavo._version import __version__
from octavo.errors import (
    AdapterError,
    CheckpointError,
    DataError,
    ModelError,
    OctavoError,
    StoppedError,
    TrainingError,
    UsageError,
)

__all__ = [
    "AdapterError",
    "CheckpointError",
    "DataError",
    "ModelError",
    "OctavoError",
    "StoppedError",
    "TrainingError",
    "UsageError",
    "__version__",
]
