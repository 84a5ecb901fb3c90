"""Where autocast must not be what it is around the call of the model."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def no_autocast() -> Iterator[None]:
    """Runs the body in the types it is given.

    For backwards, whose operators follow the types of their forwards, and for captures: autocast
    around the model is applied when its operators run.
    """
    with contextlib.ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


@contextlib.contextmanager
def no_weight_cache() -> Iterator[None]:
    """Has autocast cast weights anew in the body.

    What is computed twice must cast twice: a weight that was cast outside is not saved inside.
    """
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)
