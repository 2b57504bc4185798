"""The exceptions that a user may see.

    OctavoError               exit code 1
    ├── UsageError            exit code 2: an invalid option or configuration key, a path that does not exist
    │   └── UnknownOptionError    also a TypeError: a keyword argument that a function of the Python API does not have
    ├── DataError             a data file cannot be read; has the file and the line
    ├── ModelError            a model is missing, corrupt, unsafe or of an unknown architecture
    ├── AdapterError          an adapter does not match the model, or its files are corrupt
    ├── CheckpointError       a training checkpoint cannot be written, read or resumed from
    └── TrainingError         training cannot continue: a NaN loss, a missing gradient
        └── StoppedError      a signal stopped training; exit code 128 + signal: 130 Ctrl-C, 143 SIGTERM, 129 SIGHUP

The message describes what happened and where; `hint` describes what to do next. Errors in octavo's own logic are
assertions, because a user cannot fix them.
"""

from __future__ import annotations


class OctavoError(Exception):
    """Base class. `str(error)` is the message, followed by the hint on a second line."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message


class UsageError(OctavoError, ValueError):
    """Invalid usage. Nothing was started."""

    exit_code = 2


class UnknownOptionError(UsageError, TypeError):
    """A function of the Python API has no option of this name. The hint has the most similar ones."""


class DataError(OctavoError, ValueError):
    """A data file cannot be read. `source` is the file, `line` the 1-based line or record."""

    def __init__(self, message: str, *, source: str = "", line: int = 0, hint: str = "") -> None:
        where = f"{source}:{line}: " if source and line else f"{source}: " if source else ""
        super().__init__(where + message, hint=hint)
        self.source = source
        self.line = line


class ModelError(OctavoError, ValueError):
    """A model cannot be loaded, or its files contradict each other."""


class AdapterError(OctavoError, ValueError):
    """An adapter does not match the model, or its files are corrupt."""


class CheckpointError(OctavoError, RuntimeError):
    """A training checkpoint cannot be written, read, or resumed from."""


class TrainingError(OctavoError, RuntimeError):
    """Training cannot continue."""


class TimeLimitError(OctavoError, RuntimeError):
    """The time that was given is too short for any result. What was done is saved."""

    exit_code = 3


class StoppedError(TrainingError):
    """A signal stopped training after the state was saved. `number` is the signal number."""

    def __init__(self, message: str, *, number: int, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.exit_code = 128 + number
