"""Python's and NumPy's global generators, of which PyTorch knows nothing."""

from __future__ import annotations

import contextlib
import random
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

_NUMPY_SEEDS = 1 << 32


class HostState:
    """The state of both generators at one time; equal to another one if nothing was drawn."""

    def __init__(self) -> None:
        self._python = random.getstate()
        self._numpy: dict[str, Any] = np.random.get_state(legacy=False)

    def __eq__(self, other: object) -> bool:
        """Whether both would draw the same."""
        if not isinstance(other, HostState):
            return NotImplemented
        return self._python == other._python and _alike(self._numpy, other._numpy)

    __hash__ = None  # type: ignore[assignment]

    def restore(self) -> None:
        """Has the generators draw what they would have then."""
        random.setstate(self._python)
        np.random.set_state(self._numpy)


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Leaves the generators as they were before the body."""
    before = HostState()
    try:
        yield
    finally:
        before.restore()


def seed(number: int) -> None:
    """Seeds both."""
    random.seed(number)
    np.random.seed(number % _NUMPY_SEEDS)


def _alike(one: object, other: object) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_alike(one[key], other[key]) for key in one)
    return bool(np.array_equal(one, other))  # type: ignore[arg-type]
