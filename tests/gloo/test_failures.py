"""What goes wrong on one rank stops all of them soon, with a message that says what to do."""

from __future__ import annotations

import json
import os
import time
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import pyrannc
from tests.gloo.pool import Failure
from tests.models import case

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.gloo.pool import Pools

pytestmark = [pytest.mark.gloo]

MOST_SECONDS = 30
PLAIN = pyrannc.Config(measure=False, profile_cache_dir="off", timeout_s=25)


def failures(
    pools: Pools, function: Callable[..., Any], *args: Any, world: int = 2
) -> list[Failure]:
    """How each rank failed; the test fails if one did not, or took too long."""
    pools.started(world)  # that takes a while, and is none of the failure
    start = time.monotonic()
    outcomes = pools.outcomes(world, function, *args, seconds=MOST_SECONDS + 20)
    assert time.monotonic() - start < MOST_SECONDS
    for rank, outcome in enumerate(outcomes):
        assert isinstance(outcome, Failure), f"rank {rank} went on"
    return outcomes


def run(model: nn.Module, *args: torch.Tensor, **options: Any) -> None:
    """Wraps a model and takes one training step."""
    options = {"config": PLAIN, **options}
    wrapped = pyrannc.RaNNCModule(model, torch.optim.SGD(model.parameters(), lr=0.1), **options)
    wrapped(*args).pow(2).mean().backward()


def too_large() -> None:
    config = pyrannc.Config(measure=False, profile_cache_dir="off", mem_limit_gb=1e-5, mem_margin=0)
    run(nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 512)), torch.randn(4, 512), config=config)


def test_a_model_that_does_not_fit_says_by_how_much(pools: Pools) -> None:
    for failure in failures(pools, too_large):
        assert failure.kind == "DoesNotFitError"
        assert "needs" in failure.message
        assert "10.49 KiB" in failure.message  # 1e-5 GiB
        assert "MiB" in failure.message
        assert "hint:" in failure.message


def different_models() -> None:
    hidden = 4 + pyrannc.get_rank()
    run(nn.Sequential(nn.Linear(4, hidden), nn.Linear(hidden, 4)), torch.randn(4, 4))


def test_different_models_are_found(pools: Pools) -> None:
    for failure in failures(pools, different_models):
        assert failure.kind == "MismatchError"
        assert "different models" in failure.message
        assert "rank 1" in failure.message


def different_shapes() -> None:
    run(nn.PReLU(), torch.randn(4, 3 + pyrannc.get_rank()))


def test_different_shapes_are_shown_by_rank(pools: Pools) -> None:
    for failure in failures(pools, different_shapes):
        assert failure.kind == "MismatchError"
        assert "rank 0" in failure.message
        assert "rank 1" in failure.message
        assert "first dimension" in failure.message


def write_deployment(name: str, path: str) -> None:
    chosen = case(name)
    wrapped = pyrannc.RaNNCModule(chosen.make_model(), config=PLAIN)
    args, kwargs = chosen.make_batch(4)
    wrapped(*args, **kwargs)
    wrapped.save_deployment(path)
    wrapped.undeploy()


def load_deployment(name: str, path: str) -> None:
    chosen = case(name)
    args, kwargs = chosen.make_batch(4)
    wrapped = pyrannc.RaNNCModule(chosen.make_model(), load_deployment=path, config=PLAIN)
    wrapped(*args, **kwargs)
    wrapped.undeploy()


def test_a_deployment_of_another_model_is_refused(pools: Pools, tmp_path: Path) -> None:
    path = str(tmp_path / "deployment.json")
    pools.run(2, write_deployment, "fork_join", path)
    pools.run(2, load_deployment, "fork_join", path)
    for failure in failures(pools, load_deployment, "shared_input", path):
        assert failure.kind == "DeploymentError"
        assert "another model" in failure.message
        assert "ForkJoin" in failure.message
        assert "SharedInput" in failure.message


def test_a_deployment_for_another_world_is_refused(pools: Pools, tmp_path: Path) -> None:
    path = str(tmp_path / "deployment.json")
    pools.run(1, write_deployment, "fork_join", path)
    for failure in failures(pools, load_deployment, "fork_join", path):
        assert failure.kind == "DeploymentError"
        assert "made for 1 processes, but 2 are running" in failure.message


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.99])
def test_a_truncated_deployment_is_refused(pools: Pools, tmp_path: Path, kept: float) -> None:
    path = tmp_path / "deployment.json"
    pools.run(2, write_deployment, "fork_join", str(path))
    text = path.read_text()
    path.write_text(text[: int(len(text) * kept)])
    for failure in failures(pools, load_deployment, "fork_join", str(path)):
        assert failure.kind == "DeploymentError"
        assert str(path) in failure.message
        assert "damaged or incomplete" in failure.message


def test_a_deployment_that_contradicts_itself_is_refused(pools: Pools, tmp_path: Path) -> None:
    path = tmp_path / "deployment.json"
    pools.run(2, write_deployment, "fork_join", str(path))
    plan = json.loads(path.read_text())
    plan["stages"][0]["ranks"] = [0, 5]
    path.write_text(json.dumps(plan))
    for failure in failures(pools, load_deployment, "fork_join", str(path)):
        assert failure.kind == "DeploymentError"
        assert "stage 0 has rank 5, needed 0 to 1" in failure.message


def bad_setting() -> None:
    os.environ["RANNC_PARTITION_NUM"] = "two"
    try:
        pyrannc.RaNNCModule(nn.Linear(2, 2))
    finally:
        del os.environ["RANNC_PARTITION_NUM"]


def test_a_bad_setting_is_named(pools: Pools) -> None:
    for failure in failures(pools, bad_setting):
        assert failure.kind == "ConfigurationError"
        assert "partition_num" in failure.message
        assert "'two'" in failure.message
        assert "whole number" in failure.message


class Fragile(nn.Module):
    """Fails on one rank while it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.ones(4) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Wherever the model is cut, every stage has an operator that may fail.
        for weight in self.weights:
            x = fragile(x, weight)
        return x


@torch.library.custom_op("pyrannc_tests::fragile", mutates_args=())
def fragile(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    if os.environ.get("FRAGILE_RANK") == str(pyrannc.get_rank()):
        raise RuntimeError("this rank has had enough")
    return x * weight


@fragile.register_fake
def _(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def fragile_backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x, weight = context.saved_tensors
    return gradient * weight, (gradient * x).sum(0)


fragile.register_autograd(
    fragile_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
)


def fail_inside(failing: int, stages: int) -> None:
    os.environ.pop("FRAGILE_RANK", None)
    config = pyrannc.Config(
        partition_num=stages, pipeline_num=2, measure=False, profile_cache_dir="off", timeout_s=25
    )
    wrapped = pyrannc.RaNNCModule(Fragile(), config=config)
    x = torch.randn(4, 4)
    wrapped(x).pow(2).mean().backward()
    os.environ["FRAGILE_RANK"] = str(failing)
    wrapped(x)


@pytest.mark.parametrize("failing", [0, 1, 3])
def test_an_exception_in_one_stage_stops_every_rank(pools: Pools, failing: int) -> None:
    stopped = failures(pools, fail_inside, failing, 4, world=4)
    for rank, failure in enumerate(stopped):
        assert failure.kind == "ExecutionError", failure.trace
        assert f"rank {failing}, stage {failing}, action" in failure.message
        assert "this rank has had enough" in failure.message
        assert (rank == failing) or "another rank failed" in failure.message
