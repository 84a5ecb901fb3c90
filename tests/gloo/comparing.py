"""Trains a model for two steps with RaNNC, and its copy on each process with the global batch."""

from __future__ import annotations

import copy
import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

import pyrannc
from tests.gloo.layouts import config, share

if TYPE_CHECKING:
    from collections.abc import Callable

ROWS = 8
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def mean_square(results: Any) -> torch.Tensor:
    """Of all results; a single scalar counts as it is."""
    tensors = [tensor for tensor in pytree.tree_leaves(results) if tensor.requires_grad]
    if len(tensors) == 1 and tensors[0].dim() == 0:
        return tensors[0]
    return torch.stack([tensor.pow(2).mean() for tensor in tensors]).sum()


@dataclass(frozen=True)
class Compared:
    """A model, its global batch of `ROWS` rows, and a loss made of its results."""

    make: Callable[[], torch.nn.Module]
    batch: Callable[[], dict[str, Any] | tuple[Any, ...]]
    loss: Callable[[Any], torch.Tensor] = mean_square


def compare(module: str, name: str, stages: int) -> None:
    """On each process: what `CASES[name]` of a test module gives is what the bare model gives.

    Args:
        module: where the case is.
        name: its name there.
        stages: how many stages to force, with two microbatches; 0 for the free choice.
    """
    case: Compared = importlib.import_module(module).CASES[name]
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        _compare(case, stages)
    finally:
        torch.set_default_dtype(before)


def _compare(case: Compared, stages: int) -> None:
    torch.manual_seed(0)
    model = case.make()
    bare = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(one.parameters(), 0.1) for one in (model, bare)]
    settings = config(stages) if stages else config(0, 0)
    wrapped = pyrannc.RaNNCModule(model, optimizers[0], config=settings)
    for step in range(2):
        torch.manual_seed(step)
        batch = case.batch()
        expected = _step(bare, optimizers[1], batch, case.loss)
        found = _step(wrapped, optimizers[0], _own(batch), case.loss)
        for one, other in zip(found, pytree.tree_leaves(_own(expected)), strict=True):
            torch.testing.assert_close(one, other, **CLOSE)
            same_format = one.dim() < 4 or one.stride()[1:] == other.stride()[1:]
            assert same_format, (one.stride(), other.stride())
    state = wrapped.state_dict()
    if pyrannc.get_rank() != 0:
        wrapped.undeploy()
        return
    assert list(state) == list(bare.state_dict())
    for key, tensor in bare.state_dict().items():
        torch.testing.assert_close(state[key], tensor, **CLOSE, msg=lambda m, k=key: f"{k}: {m}")
    wrapped.undeploy()


def _step(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Any,
    loss: Callable[[Any], torch.Tensor],
) -> list[torch.Tensor]:
    results = model(**batch) if isinstance(batch, dict) else model(*batch)
    optimizer.zero_grad()
    loss(results).backward()
    optimizer.step()
    return [tensor.detach() for tensor in pytree.tree_leaves(results)]


def _own(batch: Any) -> Any:
    """This process's rows of what has rows."""

    def rows(item: Any) -> Any:
        has_rows = isinstance(item, torch.Tensor) and item.dim() and item.shape[0] == ROWS
        return share(item) if has_rows else item

    return pytree.tree_map(rows, batch)
