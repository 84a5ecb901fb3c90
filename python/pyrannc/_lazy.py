"""Compiles graphs when they are first called.

`fx.GraphModule` makes Python source of its graph and compiles it whenever the graph is replaced.
An exported program goes through many hands, and none of them calls it.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from torch import fx

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def compiled_when_called() -> Iterator[None]:
    """Has graphs that are made or changed inside compiled when they are first called."""
    original = fx.GraphModule.recompile

    def recompile(module: fx.GraphModule) -> None:
        def forward(self: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
            original(self)
            return self.forward(*args, **kwargs)

        # Each graph has a class of its own.
        type(module).forward = forward

    setattr(fx.GraphModule, "recompile", recompile)  # noqa: B010
    try:
        yield
    finally:
        setattr(fx.GraphModule, "recompile", original)  # noqa: B010
