"""Gradients that accumulate over several backwards and are added up between ranks once.

A *script* is a list of words that one process with the whole batch and all ranks follow alike:
`keep0` is a backward of batch 0 inside of `no_sync()`, `add0` one outside; `zero`, `step`,
`allreduce`, `delay` and `undelay` are the calls of these names. After an `add`, an `allreduce` and
a `step` all gradients are compared.
"""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING, Any

import pytest
import torch

import pyrannc
from tests.covering import covering
from tests.gloo.test_equivalence import EXACT, EXACT_STATE
from tests.gloo.training import Record, Setup, global_batch, local_batch, make_optimizer, wrap
from tests.models import case

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.gloo.pool import Pools

pytestmark = [pytest.mark.gloo]

# Four batches, the last ones smaller, and of another size on every rank.
ROWS = {
    1: ((8,), (5,), (3,), (3,)),
    2: ((4, 4), (3, 2), (4, 1), (2, 1)),
    4: ((4, 4, 4, 4), (3, 1, 2, 1), (1, 2, 3, 4), (4, 0, 1, 2)),
}
SCRIPTS = {
    "mixed": "add0 keep1 keep2 add3 step add0 step",
    "once_at_the_end": "keep0 keep1 add2 step zero keep1 add3 step",
    "every_backward": "add0 add1 step zero add2 add3 step",
    "explicit": "keep0 keep1 allreduce keep2 allreduce step",
    "as_the_original": "delay add0 add1 allreduce step zero add2 undelay add3 step",
    "zeroed": "keep0 zero keep1 add2 step zero keep3 zero add0 step",
}
ONE_STAGE = {1: ((0,),), 2: ((0, 1),), 4: ((0, 1, 2, 3),)}


def follow_plainly(name: str, setup: Setup, script: str) -> Record:
    """On one process, with the global batches."""
    chosen = case(name)
    model = chosen.make_model()
    optimizer = make_optimizer(chosen, model, setup)
    assert optimizer is not None

    def backward(index: int, *, kept: bool) -> None:
        args, kwargs = global_batch(chosen, sum(setup.rows[index]), index, setup)
        chosen.make_loss(model(*args, **kwargs)).backward()

    def gradients() -> dict[str, torch.Tensor | None]:
        named = model.named_parameters()
        return {key: None if p.grad is None else p.grad.clone() for key, p in named}

    record = _follow(script, optimizer, backward, gradients, {})
    record.state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    return record


def follow_with_rannc(name: str, setup: Setup, script: str, folder: str) -> Record:
    """On this process, one of several."""
    chosen = case(name)
    wrapped, optimizer = wrap(chosen, setup, folder)
    assert optimizer is not None

    def backward(index: int, *, kept: bool) -> None:
        args, kwargs = local_batch(chosen, setup, index, setup.rows[index])
        with wrapped.no_sync() if kept else contextlib.nullcontext():
            chosen.make_loss(wrapped(*args, **kwargs)).backward()

    def gradients() -> dict[str, torch.Tensor | None] | None:
        names = [key for key, _ in wrapped.named_parameters(from_global=True)]
        return {key: wrapped.get_param_grad(key) for key in names}

    calls = {
        "allreduce": wrapped.allreduce_grads,
        "delay": functools.partial(pyrannc.delay_grad_allreduce, True),
        "undelay": functools.partial(pyrannc.delay_grad_allreduce, False),
    }
    try:
        record = _follow(script, optimizer, backward, gradients, calls)
    finally:
        pyrannc.delay_grad_allreduce(False)
    record.state = dict(wrapped.state_dict())
    wrapped.undeploy()
    return record


def _follow(
    script: str,
    optimizer: torch.optim.Optimizer,
    backward: Callable[..., None],
    gradients: Callable[[], Any],
    calls: dict[str, Callable[[], None]],
) -> Record:
    record = Record()
    delayed = False
    for word in script.split():
        name, index = word.rstrip("0123456789"), word[-1]
        if name in ("keep", "add"):
            backward(int(index), kept=name == "keep")
        elif name == "zero":
            optimizer.zero_grad()
        elif name == "step":
            optimizer.step()
        else:
            calls.get(name, lambda: None)()
        delayed = name == "delay" or (delayed and name != "undelay")
        if name in ("allreduce", "step") or (name == "add" and not delayed):
            record.gradients.append(gradients())
    return record


reference = functools.cache(follow_plainly)


def check(pools: Pools, name: str, setup: Setup, script: str, folder: Path) -> None:
    plain = reference(name, Setup(setup.rows), script)
    records = pools.run(setup.world_size, follow_with_rannc, name, setup, script, str(folder))
    for record in records:
        assert len(record.gradients) == len(plain.gradients) > 0
        for ours, theirs in zip(record.gradients, plain.gradients, strict=True):
            torch.testing.assert_close(ours, theirs, **EXACT)
    torch.testing.assert_close(records[0].state, plain.state, **EXACT_STATE)


@pytest.mark.parametrize(
    "script",
    [pytest.param(script, id=name) for name, script in SCRIPTS.items()],
)
def test_unequal_replicas_and_a_tied_parameter(pools: Pools, script: str, tmp_path: Path) -> None:
    setup = Setup(ROWS[4], microbatches=3, stage_ranks=((0,), (1, 2, 3)))
    check(pools, "shared_embedding", setup, script, tmp_path)


@pytest.mark.parametrize(
    ("script", "schedule"),
    [
        ("mixed", "1f1b"),
        ("as_the_original", "fill_drain"),
        ("as_the_original", "1f1b"),
    ],
)
def test_a_model_that_returns_its_loss(
    pools: Pools, script: str, schedule: str, tmp_path: Path
) -> None:
    setup = Setup(ROWS[2], microbatches=2, stage_ranks=((0, 1), (1,)), schedule=schedule)
    check(pools, "gpt", setup, SCRIPTS[script], tmp_path)


@pytest.mark.parametrize("world", [1, 2])
def test_one_stage(pools: Pools, world: int, tmp_path: Path) -> None:
    setup = Setup(ROWS[world], microbatches=2, stage_ranks=ONE_STAGE[world])
    check(pools, "gpt", setup, SCRIPTS["mixed"], tmp_path)


@pytest.mark.parametrize(
    ("script", "name", "stage_ranks", "level"),
    [
        ("mixed", "gpt", ((0, 1),), "optimizer"),
        ("explicit", "shared_embedding", ((0,), (1, 2, 3)), "parameters"),  # and whole ones
        *(
            (script, name, stage_ranks, level)
            for script, (name, stage_ranks), level in covering(
                list(SCRIPTS),
                [
                    ("gpt", ((0, 1),)),
                    ("fork_join", ((0, 1, 2, 3),)),
                    ("shared_embedding", ((0,), (1, 2, 3))),
                    ("fork_join", ((0, 1), (2, 3))),
                ],
                ["optimizer", "gradients", "parameters"],
            )
        ),
    ],
    ids=str,
)
def test_divided_parameters(
    pools: Pools,
    script: str,
    name: str,
    stage_ranks: tuple[tuple[int, ...], ...],
    level: str,
    tmp_path: Path,
) -> None:
    world = 1 + max(rank for ranks in stage_ranks for rank in ranks)
    setup = Setup(ROWS[world], microbatches=2, stage_ranks=stage_ranks, sharding=level)
    check(pools, name, setup, SCRIPTS[script], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "name", "stage_ranks", "schedule", "microbatches"),
    covering(
        list(SCRIPTS),
        ["gpt", "shared_embedding", "fork_join"],
        [((0, 1),), ((0,), (1,)), ((0, 1, 2, 3),), ((0, 1), (2, 3)), ((0, 1, 2), (3,))],
        ["fill_drain", "1f1b"],
        [1, 3],
        # 1F1B needs a model that returns its loss.
        possible=lambda _, name, __, schedule, ___: schedule == "fill_drain" or name == "gpt",
    ),
    ids=str,
)
def test_every_script_in_many_ways(
    pools: Pools,
    script: str,
    name: str,
    stage_ranks: tuple[tuple[int, ...], ...],
    schedule: str,
    microbatches: int,
    tmp_path: Path,
) -> None:
    world = 1 + max(rank for ranks in stage_ranks for rank in ranks)
    setup = Setup(
        ROWS[world], microbatches=microbatches, stage_ranks=stage_ranks, schedule=schedule
    )
    check(pools, name, setup, SCRIPTS[script], tmp_path)


def misuse(folder: str) -> None:
    """Every call that needs reduced gradients says what to do while some wait."""
    setup = Setup(ROWS[2], stage_ranks=((0, 1),))
    chosen = case("fork_join")
    wrapped, optimizer = wrap(chosen, setup, folder)
    assert optimizer is not None

    def backward() -> None:
        args, kwargs = local_batch(chosen, setup, 0, setup.rows[0])
        chosen.make_loss(wrapped(*args, **kwargs)).backward()

    with pytest.raises(pyrannc.RaNNCError, match=r"found nothing to do.*\n.*no_sync"):
        wrapped.allreduce_grads()
    backward()
    with pytest.raises(pyrannc.RaNNCError, match="found nothing to do"):
        wrapped.allreduce_grads()
    with wrapped.no_sync():
        backward()
    name = next(key for key, _ in wrapped.named_parameters())
    unknown = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.1)
    for call in (optimizer.step, unknown.step, functools.partial(wrapped.get_param_grad, name)):
        with pytest.raises(pyrannc.RaNNCError, match=r"not been added up yet\n.*allreduce_grads"):
            call()
    torch.optim.SGD([torch.zeros(2, requires_grad=True)], lr=0.1).step()  # none of the model's
    wrapped.allreduce_grads()
    optimizer.step()
    with wrapped.no_sync():
        backward()
    optimizer.zero_grad()
    optimizer.step()  # there is nothing to step with
    with wrapped.no_sync():
        backward()
    optimizer.step(backward)
    with wrapped.no_sync(), pytest.raises(pyrannc.RaNNCError, match="not been added up yet"):
        optimizer.step(backward)
    wrapped.undeploy()


def test_misuse_is_found_at_the_call(pools: Pools, tmp_path: Path) -> None:
    pools.run(2, misuse, str(tmp_path))


def disagree(folder: str) -> None:
    setup = Setup(ROWS[2], stage_ranks=((0, 1),))
    chosen = case("fork_join")
    wrapped, _ = wrap(chosen, setup, folder)
    args, kwargs = local_batch(chosen, setup, 0, setup.rows[0])
    with wrapped.no_sync() if pyrannc.get_rank() == 0 else contextlib.nullcontext():
        wrapped(*args, **kwargs)


def test_ranks_must_enter_it_together(pools: Pools, tmp_path: Path) -> None:
    for outcome in pools.outcomes(2, disagree, str(tmp_path)):
        assert outcome.kind == "MismatchError"
        assert "rank 0" in outcome.message
        assert "their all-reduce delayed" in outcome.message
        assert "no_sync() on all ranks together" in outcome.message
