"""Activation checkpoints of the user's own in a forward, which capture looks through.

What is computed again in the backward is decided by the plan instead, by memory and time, so the
user is told.
"""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING, Any

import torch
import torch.utils.checkpoint

if TYPE_CHECKING:
    from collections.abc import Iterator

logger = logging.getLogger(__name__)

_GENERATOR = "_checkpoint_without_reentrant_generator_impl"


@contextlib.contextmanager
def telling() -> Iterator[None]:
    """Warns once if the body calls ``torch.utils.checkpoint.checkpoint``."""
    module: Any = torch.utils.checkpoint
    found: list[bool] = []
    generator = getattr(module, _GENERATOR, None)

    def noted_generator(*args: Any, **kwargs: Any) -> Any:
        found.append(True)
        assert generator is not None
        return generator(*args, **kwargs)

    def noted_apply(cls: type, *args: Any) -> Any:
        found.append(True)
        return torch.autograd.Function.__dict__["apply"].__get__(None, cls)(*args)

    if generator is not None:
        setattr(module, _GENERATOR, noted_generator)
    module.CheckpointFunction.apply = classmethod(noted_apply)
    try:
        yield
    finally:
        del module.CheckpointFunction.apply
        if generator is not None:
            setattr(module, _GENERATOR, generator)
    if found:
        logger.warning(
            "the activation checkpoints in the model's forward are left out: the plan decides what "
            "is computed again in the backward, where memory is short (see `recompute` and "
            "`mem_limit_gb`)"
        )
