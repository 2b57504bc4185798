"""Everything that can go wrong in a way a user may see, as one tree.

    OctavoError               exit code 1
    ├── UsageError            exit code 2: a flag, a configuration key, a path that does not exist
    ├── DataError             a text file that cannot be read as asked; names the file and the line
    ├── ModelError            a checkpoint that is missing, broken, unsafe or of an unknown architecture
    ├── AdapterError          an adapter that does not fit the model it is put on
    ├── CheckpointError       a training checkpoint that cannot be written, read or resumed from
    └── TrainingError         training cannot go on: a loss that is not a number, a gradient that is missing
        └── StoppedError      a signal stopped it; exit code 128 + its number: 130 Ctrl-C, 143 SIGTERM, 129 SIGHUP

Every message says what happened and where; `hint` says what to do next. Errors of octavo's own logic are
plain assertions: a user can do nothing about them.
"""

from __future__ import annotations


class OctavoError(Exception):
    """The root of the tree. `str(error)` is the message, followed by the hint on a line of its own."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message


class UsageError(OctavoError, ValueError):
    """The request itself is wrong: nothing was started."""

    exit_code = 2


class DataError(OctavoError, ValueError):
    """A file of the user's cannot be read as asked. `source` is the file, `line` the 1-based line or record."""

    def __init__(self, message: str, *, source: str = "", line: int = 0, hint: str = "") -> None:
        where = f"{source}:{line}: " if source and line else f"{source}: " if source else ""
        super().__init__(where + message, hint=hint)
        self.source = source
        self.line = line


class ModelError(OctavoError, ValueError):
    """A model cannot be opened, or is not what it says it is."""


class AdapterError(OctavoError, ValueError):
    """An adapter and a model do not belong together, or an adapter's files are broken."""


class CheckpointError(OctavoError, RuntimeError):
    """A training checkpoint cannot be written, read, or resumed from."""


class TrainingError(OctavoError, RuntimeError):
    """Training stopped because going on would waste the run."""


class StoppedError(TrainingError):
    """A signal asked to stop, and the work was put into order first. `number` is the signal's."""

    def __init__(self, message: str, *, number: int, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.exit_code = 128 + number
