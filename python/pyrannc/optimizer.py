"""The user's optimizer after deployment: it keeps this rank's parameters, otherwise itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Container

_PROBE_SIZE = 64


def keep_local(optimizer: torch.optim.Optimizer, local: Container[torch.nn.Parameter]) -> None:
    """Takes every parameter that is not in ``local`` out of the optimizer, with its state.

    Groups stay, even empty ones, so that learning-rate schedulers and the user's own code find
    them.
    """
    for group in optimizer.param_groups:
        kept = [p in local for p in group["params"]]
        for name in ("params", "param_names"):
            if name in group:
                group[name] = [item for item, keep in zip(group[name], kept, strict=True) if keep]
    for parameter in list(optimizer.state):
        if isinstance(parameter, torch.nn.Parameter) and parameter not in local:
            del optimizer.state[parameter]


def state_bytes_per_parameter_byte(optimizer: torch.optim.Optimizer) -> float | None:
    """How many bytes this optimizer keeps for each byte of parameters: 2 for Adam, 0 for SGD.

    Measured by one step of an optimizer of the same class and options on a small parameter of its
    own; ``None`` when that class needs more than a gradient (a closure, say).
    """
    parameter = torch.nn.Parameter(torch.zeros(_PROBE_SIZE, _PROBE_SIZE))
    parameter.grad = torch.ones_like(parameter)
    options = {k: v for k, v in optimizer.param_groups[0].items() if k in optimizer.defaults}
    try:
        probe = type(optimizer)([{"params": [parameter], **options}], **_arguments(optimizer))
        probe.step()
    except Exception:  # any class may refuse; the caller has a default
        return None
    tensors = [t for t in probe.state[parameter].values() if isinstance(t, torch.Tensor)]
    large = sum(t.nbytes for t in tensors if t.numel() > 1)
    return large / parameter.nbytes


def _arguments(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {"lr": 0.1} if "lr" in optimizer.defaults else {}
