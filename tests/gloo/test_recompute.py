"""Values that a plan says to compute again: nothing changes but the memory."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import pyrannc
from tests.covering import covering
from tests.gloo.layouts import config
from tests.gloo.pool import Failure
from tests.gloo.test_equivalence import ROWS, check
from tests.gloo.training import Record, Setup, local_batch, train_with_rannc, wrap
from tests.models import case

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.gloo.pool import Pools

pytestmark = [pytest.mark.gloo]

WHOLE_STAGE = 10_000
LAYOUTS = [
    ((0,), (1, 2, 3)), ((0,),),
    ((0,), (1,)), ((0, 1),), ((0, 1), (2, 3)), ((0,), (1,), (2,), (3,)),
]  # fmt: skip


def setup(
    layout: tuple[tuple[int, ...], ...], recompute: int, microbatches: int, **options: Any
) -> Setup:
    world = 1 + max(rank for ranks in layout for rank in ranks)
    return Setup(ROWS[world], 0, microbatches, stage_ranks=layout, recompute=recompute, **options)


@pytest.mark.parametrize(
    ("layout", "schedule", "recompute"),
    covering(LAYOUTS, ["fill_drain", "1f1b"], [5, WHOLE_STAGE]),
    ids=str,
)
def test_a_loss_is_the_same(
    pools: Pools,
    layout: tuple[tuple[int, ...], ...],
    schedule: str,
    recompute: int,
    tmp_path: Path,
) -> None:
    check(pools, case("gpt"), setup(layout, recompute, 4, schedule=schedule), tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "fork_join",
        "shared_embedding",
        "recurrent",
        "masked_loss",
        "skips",
        "dict_in_out",
    ],
)
def test_other_models_are_the_same(pools: Pools, name: str, tmp_path: Path) -> None:
    chosen = setup(((0,), (1,)), 2, 2, input_gradients=name != "masked_loss")
    check(pools, case(name), chosen, tmp_path)


@pytest.mark.parametrize("schedule", ["fill_drain", "1f1b"])
def test_random_numbers_are_the_same(pools: Pools, schedule: str, tmp_path: Path) -> None:
    kept = setup(((0,), (1,)), 0, 3, schedule=schedule, seed=3)
    expected = pools.run(2, train_with_rannc, "dropout_gpt", kept, str(tmp_path))
    for recompute in (WHOLE_STAGE, 5):
        again = dataclasses.replace(kept, recompute=recompute)
        found = pools.run(2, train_with_rannc, "dropout_gpt", again, str(tmp_path))
        for ours, theirs in zip(found, expected, strict=True):
            same(ours, theirs)
    other = dataclasses.replace(kept, seed=4)
    drawn = pools.run(2, train_with_rannc, "dropout_gpt", other, str(tmp_path))
    assert not torch.equal(drawn[0].outputs[0][0], expected[0].outputs[0][0])


def autocast_gradients(recompute: int, folder: str) -> Any:
    """Loss and gradients of two calls of one autocast region, which casts a weight once."""
    chosen = case("gpt")
    way = setup(((0,), (1,)), recompute, 2)
    with torch.autocast("cpu", torch.bfloat16):
        wrapped, _ = wrap(chosen, way, folder, prepare=torch.nn.Module.float)
        losses = [wrapped(*local_batch(chosen, way, step, (4, 4))[0]) for step in range(2)]
    sum(losses).backward()
    names = [name for name, _ in wrapped.named_parameters(from_global=True)]
    gradients = {name: wrapped.get_param_grad(name) for name in names}
    wrapped.undeploy()
    return [loss.detach() for loss in losses], gradients


@pytest.mark.parametrize("recompute", [5, WHOLE_STAGE])
def test_weights_cast_by_autocast_are_cast_again(
    pools: Pools, recompute: int, tmp_path: Path
) -> None:
    kept, again = (pools.run(2, autocast_gradients, size, str(tmp_path)) for size in (0, recompute))
    torch.testing.assert_close(again, kept, rtol=0, atol=0)


class Checkpointed(torch.nn.Module):
    """Asks for its layer to be computed again."""

    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.layer = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh())
        self.last = torch.nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(checkpoint(self.layer, x, use_reentrant=self.reentrant))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_of_the_model_are_left_to_the_plan(
    reentrant: bool, caplog: pytest.LogCaptureFixture
) -> None:
    bare = Checkpointed(reentrant=reentrant).double()
    model = copy.deepcopy(bare)
    config = pyrannc.Config(measure=False, profile_cache_dir="off")
    wrapped = pyrannc.RaNNCModule(model, config=config)
    x = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    for module in (wrapped, bare):
        module(x).square().sum().backward()
    for ours, theirs in zip(model.parameters(), bare.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-12)
    assert "activation checkpoints in the model's forward are left out" in caplog.text
    wrapped.undeploy()


def same(ours: Record, theirs: Record) -> None:
    """Bit by bit: the same operators ran on the same numbers."""
    for name in ("outputs", "gradients", "state"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=0, atol=0)


def train_with(change: Callable[[Any], None], folder: str) -> None:
    """Plans a small GPT, changes the plan's file, and trains with it."""
    path = Path(folder) / "deployment.json"
    chosen = case("gpt")
    config = pyrannc.Config(measure=False, profile_cache_dir="off", timeout_s=25, partition_num=2)
    args, _ = chosen.make_batch(2)
    planned = pyrannc.RaNNCModule(chosen.make_model(), config=config)
    with torch.no_grad():
        planned(*args)
    planned.save_deployment(path)
    planned.undeploy()
    if pyrannc.get_rank() == 0:
        plan = json.loads(path.read_text())
        change(plan)
        path.write_text(json.dumps(plan))
    pyrannc.barrier()
    model = chosen.make_model()
    pyrannc.RaNNCModule(model, load_deployment=str(path), config=config)(*args).backward()


def test_a_buffer_that_others_use_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "deployment.json"
    settings = config(1, 1)
    norm = torch.nn.BatchNorm1d(4)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), norm, torch.nn.Tanh(), norm)
    planned = pyrannc.RaNNCModule(model, config=settings)
    planned(torch.ones(4, 4))
    planned.save_deployment(path)
    planned.undeploy()
    plan = json.loads(path.read_text())
    (stage,) = plan["stages"]
    norms = [key for key in stage["nodes"] if "batch_norm" in key]
    stage["recompute"] = [norms[:1]]
    path.write_text(json.dumps(plan))
    wrapped = pyrannc.RaNNCModule(model, load_deployment=path, config=settings)
    with pytest.raises(pyrannc.DeploymentError) as caught:
        wrapped(torch.ones(4, 4))
    found, hint = str(caught.value).split("\nhint: ")
    assert f"has `{norms[0]}` but not `{norms[1]}`, though both use memory that" in found
    assert hint == "correct the file, or plan without it"
    wrapped.undeploy()


def take_from_another_stage(plan: Any) -> None:
    plan["stages"][0]["recompute"] = [[plan["stages"][1]["nodes"][0]]]


def leave_and_enter(plan: Any) -> None:
    nodes = plan["stages"][0]["nodes"]
    plan["stages"][0]["recompute"] = [[nodes[0], nodes[-1]]]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (take_from_another_stage, "which is of stage 1"),
        (leave_and_enter, "is not convex: a path leaves it, to"),
    ],
)
def test_what_cannot_run_is_refused(
    pools: Pools, change: Callable[[Any], None], problem: str, tmp_path: Path
) -> None:
    for outcome in pools.outcomes(2, train_with, change, str(tmp_path)):
        assert isinstance(outcome, Failure)
        assert outcome.kind == "DeploymentError"
        assert problem in outcome.message
        assert "hint: " in outcome.message
