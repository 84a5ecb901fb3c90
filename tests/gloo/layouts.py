"""Plans with given ranks for the stages of a test's own model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import pyrannc

if TYPE_CHECKING:
    from collections.abc import Callable

Layout = tuple[tuple[int, ...], ...]
"""The ranks of each stage."""


def config(stages: int, microbatches: int = 2, **items: Any) -> pyrannc.Config:
    """Settings that force a number of stages and of microbatches, and others if given."""
    given = {"measure": False, "profile_cache_dir": "off", "timeout_s": 40, **items}
    return pyrannc.Config(partition_num=stages, pipeline_num=microbatches, **given)


def share(tensor: torch.Tensor) -> torch.Tensor:
    """This process's rows."""
    return tensor.tensor_split(pyrannc.get_world_size())[pyrannc.get_rank()]


def deployment(
    make: Callable[[], torch.nn.Module],
    args: tuple[Any, ...],
    layout: Layout,
    folder: str,
    microbatches: int = 2,
    sharding: str = "none",
) -> str:
    """The file of a plan with these stages; collective.

    Args:
        make: makes the model.
        args: this process's batch.
        layout: the ranks of each stage.
        folder: where to put the file.
        microbatches: how many there are.
        sharding: what the replicas of each stage that has several divide.
    """
    path = Path(folder) / "deployment.json"
    planned = pyrannc.RaNNCModule(make(), config=config(len(layout), microbatches))
    with torch.no_grad():
        planned(*args)
    planned.save_deployment(path)
    planned.undeploy()
    if pyrannc.get_rank() == 0:
        plan = json.loads(path.read_text())
        plan.pop("estimates", None)
        for stage, ranks in zip(plan["stages"], layout, strict=True):
            stage["ranks"] = list(ranks)
            if len(ranks) > 1:
                stage["sharding"] = sharding
        path.write_text(json.dumps(plan))
    pyrannc.barrier()
    return str(path)
