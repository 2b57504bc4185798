"""bitsandbytes, imported quietly: it announces at import which optional packages it did not find."""

from __future__ import annotations

import logging
from typing import Any


def bitsandbytes() -> Any:
    """The module. Imported when first needed, since that takes seconds."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import bitsandbytes
    import bitsandbytes.functional

    return bitsandbytes
