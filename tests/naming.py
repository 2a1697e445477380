"""Names of tests' arguments."""

import re
from typing import Any


def named(x: Any) -> str:
    """What tells it from others, without addresses: the same in every process, so that tests can be shared out."""
    return re.sub(r" at 0x[0-9a-f]+", "", getattr(x, "__name__", repr(x)))[:80]
