"""Hooks of the user's that a deployed model would not call.

A captured model runs its operators, not its modules. What the forward hooks of its parts do to
tensors is captured with them, but no Python of theirs runs again; backward hooks are not captured
at all; hooks of parameters would see gradients of single microbatches. Hooks of the RaNNCModule
itself work, and so do those of optimizers.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from .errors import RaNNCError
from .guards import is_guard

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    import torch

logger = logging.getLogger(__name__)

_PART_OF_THE_MODEL = (
    "torch.nn.utils", "torch.nn.modules.lazy", "transformers.utils.output_capturing",
)  # fmt: skip
"""Where hooks come from that make or compute weights (lazy, weight norm, pruning), or results."""


def check_module_hooks(model: torch.nn.Module) -> None:
    """Looks for hooks of a model's parts that cannot work, before it is captured.

    Raises:
        RaNNCError: for backward hooks.
    """
    for path, kind, _ in _module_hooks(model):
        if "backward" in kind:
            raise RaNNCError(
                f"a {kind} hook is registered on `{path}`, and it would never be called: the "
                "modules of a captured model do not run",
                hint="remove it; gradients of parameters are in `.grad` after backward(), and "
                "hooks on the RaNNCModule itself work",
            )


def captured_hooks(model: torch.nn.Module) -> str | None:
    """What is said of forward hooks, which are captured with a model; `None` if it has none."""
    found = [
        f"the {kind} hook on `{path}`"
        for path, kind, hook in _module_hooks(model)
        if not str(getattr(hook, "__module__", "")).startswith(_PART_OF_THE_MODEL)
    ]
    if not found:
        return None
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    return (
        f"{found[0]}{more} is captured: what it does to tensors is part of the model, but it is "
        "not called again, so it prints no more, and using what it keeps is an error"
    )


def check_parameter_hooks(parameters: Mapping[str, torch.nn.Parameter]) -> None:
    """Looks for hooks of parameters.

    Raises:
        RaNNCError: when there is one.
    """
    for name, parameter in parameters.items():
        accumulated = getattr(parameter, "_post_accumulate_grad_hooks", None)
        if parameter._backward_hooks or accumulated:
            raise RaNNCError(
                f"a hook is registered on the parameter `{name}`, and it would be called with the "
                "gradients of single microbatches and replicas",
                hint="remove it, and change the gradient in `.grad` after backward(), or in a "
                "hook of the optimizer (register_step_pre_hook)",
            )


def _module_hooks(model: torch.nn.Module) -> Iterator[tuple[str, str, Callable[..., object]]]:
    for path, module in model.named_modules():
        for kind, hooks in (
            ("forward", module._forward_hooks),
            ("forward pre-", module._forward_pre_hooks),
            ("backward", module._backward_hooks),
            ("backward pre-", module._backward_pre_hooks),
        ):
            for hook in hooks.values():
                if not is_guard(hook):
                    yield path or "the model", kind, hook
