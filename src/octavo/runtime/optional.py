"""bitsandbytes, imported quietly: it announces at import which optional packages it did not find."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import Any

from octavo.errors import UsageError


def bitsandbytes() -> Any:
    """The module. Imported when first needed, since that takes seconds; UsageError if it is not installed."""
    if find_spec("bitsandbytes") is None:
        raise UsageError(
            "Weights are put under dynamic8 by bitsandbytes, which is not installed.",
            hint="pip install 'octavo[dynamic8]', or choose --scheme int8.",
        )
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import bitsandbytes
    import bitsandbytes.functional

    return bitsandbytes
