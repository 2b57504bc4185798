"""bitsandbytes, imported without its log messages about optional packages that it does not find."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import Any

from octavo.errors import UsageError


def bitsandbytes() -> Any:
    """The module, imported at the first call, which takes seconds. UsageError if it is not installed."""
    if find_spec("bitsandbytes") is None:
        raise UsageError(
            "--scheme dynamic8 quantizes with bitsandbytes, which is not installed.",
            hint="pip install 'octavo[dynamic8]', or choose --scheme int8.",
        )
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import bitsandbytes
    import bitsandbytes.functional

    return bitsandbytes
