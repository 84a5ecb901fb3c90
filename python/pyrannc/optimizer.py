"""The user's optimizer after deployment: it keeps this rank's parameters, otherwise itself."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from typing import TYPE_CHECKING, Any

import torch

from .errors import RaNNCError

if TYPE_CHECKING:
    from collections.abc import Container, Mapping, Sequence

    from .state import Division

_PROBE_SIZE = 64
_PROBE_SHAPE = (6, 4)
_PROBE_STEPS = 3

_TOGETHER = {"LBFGS": "it looks at all parameters together"}
_NOT_SEPARABLE = {
    "parameters": _TOGETHER,
    "entries": {
        **_TOGETHER,
        "Adafactor": "it keeps sums over the rows and columns of a parameter",
        "Muon": "it works on whole matrices",
        "SparseAdam": "it takes sparse gradients",
    },
}
"""Optimizers of PyTorch that cannot be shown to work on some, or only slowly."""
_SEPARABLE = {"parameters": {"SparseAdam"}, "entries": set[str]()}
"""Those that work, but for which the trial has no suitable gradients."""


def keep_local(optimizer: torch.optim.Optimizer, local: Container[torch.Tensor]) -> None:
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


def keep_part(
    optimizer: torch.optim.Optimizer,
    parameter: torch.nn.Parameter,
    division: Division,
    rank: int,
) -> None:
    """Cuts what the optimizer keeps for a whole parameter down to the part of ``rank``."""
    if parameter in optimizer.state:
        optimizer.state[parameter] = state_part(optimizer.state[parameter], division, rank)


def state_part(entries: Mapping[str, Any], division: Division, rank: int) -> dict[str, Any]:
    """What an optimizer keeps for the part of ``rank``, of what it keeps for the whole."""
    return {
        key: division.part(value, rank).clone()
        if isinstance(value, torch.Tensor) and key != "step" and value.shape == division.shape
        else value
        for key, value in entries.items()
    }


def foreign_parameters(number: int) -> RaNNCError | None:
    """What to say of an optimizer with so many parameters that are not the model's."""
    if number == 0:
        return None
    return RaNNCError(
        f"`optimizer` has {number} parameters that are not the model's, so that nobody would add "
        "up their gradients between the processes",
        hint="make one optimizer for each wrapped model; wrap one module that holds all that is "
        "trained together, or train other parameters with an optimizer of their own",
    )


def check_parameter_wise(optimizer: torch.optim.Optimizer) -> None:
    """Makes sure that the optimizer does to some parameters what it does to them among all.

    Shown by steps of copies of it, with the options of each of its groups, on two small parameters.

    Raises:
        RaNNCError: when it does not, or when that cannot be tried.
    """
    reason = _reason_against(optimizer, "parameters")
    if reason is not None:
        raise RaNNCError(
            f"`{type(optimizer).__name__}` cannot train parameters of which each process holds "
            f"some: {reason}",
            hint="set `partition_num=1` and leave out sharding, so that every process holds the "
            "whole model, or take an optimizer that treats each parameter by itself, such as "
            "Adam, AdamW or SGD",
        )


def check_element_wise(optimizer: torch.optim.Optimizer) -> None:
    """Makes sure that the optimizer does the same to parts of a parameter as to the whole.

    Shown as by :func:`check_parameter_wise`.

    Raises:
        RaNNCError: when it does not, or when that cannot be tried.
    """
    reason = _reason_against(optimizer, "entries")
    if reason is not None:
        raise RaNNCError(
            f"`{type(optimizer).__name__}` cannot train parameters that are divided between "
            f"replicas: {reason}",
            hint="leave out `enable_zero` and set `sharding` to `none`, or take an optimizer that "
            "treats each entry by itself, such as Adam, AdamW, SGD, RMSprop or Adagrad",
        )


def _reason_against(optimizer: torch.optim.Optimizer, pieces: str) -> str | None:
    """Why ranks that each have some parameters, or some entries, would do something else."""
    name = type(optimizer).__name__
    if name in _NOT_SEPARABLE[pieces] or name in _SEPARABLE[pieces]:
        return _NOT_SEPARABLE[pieces].get(name)
    for group in optimizer.param_groups:
        try:
            alike = _steps_alike(optimizer, group, pieces)
        except Exception as error:  # any class may refuse
            return f"a trial step failed with {type(error).__name__}: {error}"
        if not alike:
            return f"a step on separate {pieces} gives another result than on the whole"
    return None


def _steps_alike(optimizer: torch.optim.Optimizer, group: dict[str, Any], pieces: str) -> bool:
    """Whether what is stepped together and apart is the same after some steps."""
    generator = torch.Generator().manual_seed(0)
    device = next((p.device for p in group["params"]), torch.device("cpu"))

    def random() -> torch.Tensor:
        numbers = torch.randn(_PROBE_SHAPE, generator=generator, dtype=torch.float64)
        return numbers.to(device)

    # For each of two parameters its values, and its gradient in each step.
    whole = [[random() for _ in range(1 + _PROBE_STEPS)] for _ in range(2)]
    middle = whole[0][0].numel() // 2 - 1
    parts = whole
    if pieces == "entries":
        ends = (slice(None, middle), slice(middle, None))
        parts = [[t.reshape(-1)[end] for t in history] for history in whole for end in ends]
    together = _stepped(optimizer, group, whole)
    apart = [_stepped(optimizer, group, [part])[0] for part in parts]
    one, other = (torch.cat([t.reshape(-1) for t in tensors]) for tensors in (together, apart))
    # In float64 the order of operations is worth 1e-16 a step; any norm or mean changes digits.
    return torch.allclose(one, other, rtol=1e-12, atol=1e-12)


def _stepped(
    optimizer: torch.optim.Optimizer,
    group: dict[str, Any],
    histories: Sequence[Sequence[torch.Tensor]],
) -> list[torch.Tensor]:
    """The parameters after a copy of the optimizer has taken a step with each of the gradients.

    Args:
        optimizer: which to copy.
        group: the options.
        histories: for each parameter its values at first, and then its gradients.
    """
    parameters = [torch.nn.Parameter(history[0].clone()) for history in histories]
    options = {k: v for k, v in group.items() if k not in ("params", "param_names")}
    options = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    copy = object.__new__(type(optimizer))
    # What a scheduler or hook put on the object itself belongs to the original.
    copy.__dict__.update({k: v for k, v in vars(optimizer).items() if not callable(v)})
    copy.__dict__.update({k: OrderedDict() for k in vars(optimizer) if k.endswith("_hooks")})
    copy.param_groups = [{**options, "params": parameters}]
    copy.state = defaultdict(dict)
    for step in range(1, len(histories[0])):
        for parameter, history in zip(parameters, histories, strict=True):
            parameter.grad = history[step].clone()
        copy.step()
    return [parameter.detach() for parameter in parameters]


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
