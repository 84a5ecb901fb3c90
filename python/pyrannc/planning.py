"""Rank 0 plans, all ranks get the plan.

What is decided is decided in Rust; here only its inputs come together: the graph, measured times,
the cluster, the optimizer's appetite, and the configuration.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from . import _core, cluster
from ._remarks import how_to_split
from .errors import PlanError
from .optimizer import state_bytes_per_parameter_byte
from .profile import profile

if TYPE_CHECKING:
    import torch

    from .capture import Captured
    from .comm import Communicator
    from .config import Config

logger = logging.getLogger(__name__)

_USUAL_STATE_FACTOR = 2.0
"""Adam's: what to assume of an optimizer that is unknown or cannot be probed."""


def make_plan(
    comm: Communicator,
    captured: Captured,
    graph: _core.Graph,
    optimizer: torch.optim.Optimizer | None,
    *,
    batch_rows: int,
    config: Config,
    least_sharding: str,
    load_deployment: str | None,
) -> _core.Plan:
    """The deployment to use, the same on every rank; collective.

    Args:
        comm: the connections to the other ranks.
        captured: the model in training mode.
        graph: its graph.
        optimizer: whose state needs memory.
        batch_rows: rows of the global batch.
        config: what the user forces.
        least_sharding: what replicas have to divide at least.
        load_deployment: a deployment file to use as it is.

    Raises:
        DeploymentError: when the file is damaged, belongs to another model or number of
            processes, or asks for what cannot be run yet.
        DoesNotFitError: when no plan fits the devices' memory.
        PlanError: when what the configuration forces cannot be had.
    """
    path = load_deployment or (config.deployment_file if config.load_deployment else None)
    description = None if path else cluster.describe(comm, config)
    outcome: str | Exception | None = None
    if comm.rank == 0:
        try:
            if description is None:
                assert path is not None
                plan = _core.Plan.load(path).shard_at_least(least_sharding)
            else:
                search = _Search(captured, graph, optimizer, batch_rows, config, least_sharding)
                plan = search.plan(comm, description)
            plan.check(graph, comm.world_size)
            if config.save_deployment:
                plan.save(config.deployment_file)
            outcome = plan.to_json()
        except Exception as error:  # raised below on every rank
            outcome = _with_remedy(error, graph)
    outcome = comm.broadcast_object(outcome)
    if isinstance(outcome, Exception):
        raise outcome
    assert isinstance(outcome, str)
    return _core.Plan.from_json(outcome)


def _with_remedy(error: Exception, graph: _core.Graph) -> Exception:
    """The error; if it is that the batch cannot be split, with what RaNNCModule can be told."""
    reason = graph.unsplittable_reason
    if not isinstance(error, PlanError) or reason is None or reason not in error.message:
        return error
    return type(error)(error.message, "; ".join(filter(None, [error.hint, how_to_split(reason)])))


@dataclass(frozen=True, slots=True)
class _Search:
    """What a plan is to be found for."""

    captured: Captured
    graph: _core.Graph
    optimizer: torch.optim.Optimizer | None
    batch_rows: int
    config: Config
    least_sharding: str

    def plan(self, comm: Communicator, description: str) -> _core.Plan:
        """The best plan for a cluster."""
        config = self.config
        profile_json = None
        if config.measure:
            rows = rows_to_measure(self.batch_rows, comm.world_size)
            profile_json = profile(self.captured, self.graph, rows, comm.device, config=config)
        inputs = {"graph": self.graph.to_json(), "cluster": description, "profile": profile_json}
        _keep_inputs(config.planner_inputs_dir, inputs)
        return _core.plan(
            self.graph,
            description,
            profile_json=profile_json,
            batch_size=self.batch_rows,
            optimizer_state_factor=optimizer_state_factor(self.optimizer, config),
            partition_num=config.partition_num,
            replica_num=config.replica_num,
            pipeline_num=config.pipeline_num,
            min_pipeline=config.min_pipeline,
            max_pipeline=config.max_pipeline,
            max_partition_num=config.max_partition_num,
            mem_limit_gb=config.mem_limit_gb,
            mem_margin=config.mem_margin,
            schedule=config.schedule,
            recompute=config.recompute,
            sharding=config.sharding,
            least_sharding=self.least_sharding,
            progress=True,
        )


def _keep_inputs(folder: str, inputs: dict[str, str | None]) -> None:
    """Writes what the planner is given, so that the command `rannc` can plan the same again."""
    if folder == "off":
        return
    path = Path(folder).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
        for name, text in inputs.items():
            if text is not None:
                (path / f"{name}.json").write_text(text, encoding="utf-8")
    except OSError as error:
        message = f"cannot write the planner's inputs into `{path}`: {error}"
        raise PlanError(message, "set `planner_inputs_dir` to a writable folder") from error


def rows_to_measure(batch_rows: int, world_size: int) -> list[int]:
    """Two microbatch sizes around those that plans for this batch will have."""
    large = max(-(-batch_rows // world_size), 2)
    return sorted({max(large // 4, 1), large})


def optimizer_state_factor(optimizer: torch.optim.Optimizer | None, config: Config) -> float:
    """Bytes of optimizer state per parameter byte: as configured, else as this optimizer needs."""
    if config.opt_param_factor > 0:
        return config.opt_param_factor
    measured = None if optimizer is None else state_bytes_per_parameter_byte(optimizer)
    return _USUAL_STATE_FACTOR if measured is None else measured
