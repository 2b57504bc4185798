"""The process of `octavo`: Ctrl-C ends it with a message, from the first import to the last exit handler."""

from __future__ import annotations

import atexit
import os
import signal
from contextlib import suppress
from types import FrameType


def main() -> None:
    """Runs the command line. Around it, where nothing is to be tidied up, Ctrl-C ends the process at once."""
    heard = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # not in a shell's background job
    if heard:
        signal.signal(signal.SIGINT, _stop)
        # Once all else is done: Python gives the signal back to the system while it takes itself apart, and then a
        # Ctrl-C would put "killed" in place of the exit code that the command has by now.
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
    from octavo.cli import main as run

    try:
        run()
    except KeyboardInterrupt:  # between two handlers
        _stop()
    finally:
        if heard:
            signal.signal(signal.SIGINT, _stop)


def _stop(number: int = signal.SIGINT, frame: FrameType | None = None) -> None:
    with suppress(OSError):
        os.write(2, b"octavo: Stopped.\n")
    os._exit(128 + number)


if __name__ == "__main__":
    main()
