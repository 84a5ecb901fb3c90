"""Shows how far something is that takes longer than a second.

On rank 0 only, only on a terminal, and gone when it is done.
"""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped]

from .comm import Launch


def progress(what: str, unit: str, total: int | None = None) -> Any:
    """A bar to be updated for each unit; a context that removes it.

    Args:
        what: what is going on.
        unit: what is counted.
        total: how many there are, if that is known.
    """
    shown = sys.stderr.isatty() and Launch.from_environment().rank == 0
    return tqdm(
        desc=what,
        unit=f" {unit}",
        total=total,
        disable=not shown,
        delay=1,
        leave=False,
        file=sys.stderr,
        dynamic_ncols=True,
    )
