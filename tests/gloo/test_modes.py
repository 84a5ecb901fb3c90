"""Modes, shapes and frozen parameters change freely: nothing is planned again, and each way to
call the model is captured once."""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pyrannc
from pyrannc import deployment, planning, variants
from pyrannc.executor import Executor, Step
from tests.gloo.layouts import config, share

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.gloo.pool import Pools

pytestmark = [pytest.mark.gloo]
EXACT = {"rtol": 1e-10, "atol": 1e-12}


class Tagger(nn.Module):
    """Embeds tokens; while it trains, a second head gives a result of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.body = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
        self.norm = nn.BatchNorm1d(6)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(6, 3)
        self.other_head = nn.Linear(6, 2)

    def forward(self, tokens: Tensor) -> Any:
        hidden = self.body(self.embedding(tokens))
        hidden = self.dropout(self.norm(hidden.mean(1)))
        logits = self.head(hidden)
        return (logits, self.other_head(hidden)) if self.training else logits


@dataclass
class Counts:
    """How often a model was captured and planned."""

    captures: int = 0
    plans: int = 0


@contextlib.contextmanager
def counting() -> Iterator[Counts]:
    counts = Counts()
    capture, make_plan = deployment.capture_for_all, planning.make_plan

    def counted_capture(*args: Any, **kwargs: Any) -> Any:
        counts.captures += 1
        return capture(*args, **kwargs)

    def counted_plan(*args: Any, **kwargs: Any) -> Any:
        counts.plans += 1
        return make_plan(*args, **kwargs)

    with (
        mock.patch.object(deployment, "capture_for_all", counted_capture),
        mock.patch.object(planning, "make_plan", counted_plan),
    ):
        yield counts


def tokens(rows: int, length: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 11, (rows, length), generator=generator)


def make(module: type[nn.Module] = Tagger) -> nn.Module:
    torch.manual_seed(0)
    return module().double()


def calm(model: nn.Module) -> None:
    """Training, but for what random numbers and parts of a batch would make different."""
    model.train()
    for module in model.modules():
        if isinstance(module, (nn.Dropout, nn.BatchNorm1d)):
            module.eval()


class Pair:
    """A model on all processes, and the bare one on this process with the whole batch."""

    def __init__(self, module: type[nn.Module], stages: int, microbatches: int) -> None:
        self.bare, model = make(module), make(module)
        self.wrapped = pyrannc.RaNNCModule(model, config=config(stages, microbatches))

    def both(self) -> tuple[nn.Module, nn.Module]:
        return self.bare, self.wrapped

    def check(self, *args: Tensor) -> None:
        """Compares outputs, and gradients where there are any."""
        self.bare.zero_grad()
        self.wrapped.zero_grad()
        expected = self.bare(*args)
        given = self.wrapped(*(share(tensor) for tensor in args))
        for ours, theirs in zip(_listed(given), _listed(expected), strict=True):
            torch.testing.assert_close(ours, share(theirs), **EXACT)
        if not torch.is_grad_enabled():
            assert not any(tensor.requires_grad for tensor in _listed(given))
            return
        sum(tensor.square().mean() for tensor in _listed(expected)).backward()
        sum(tensor.square().mean() for tensor in _listed(given)).backward()
        for name, parameter in self.bare.named_parameters():
            gradient = self.wrapped.get_param_grad(name)
            assert (gradient is None) == (parameter.grad is None), name
            if gradient is not None:
                torch.testing.assert_close(gradient, parameter.grad, **EXACT)


def _listed(outputs: Any) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def epochs(stages: int, microbatches: int) -> None:
    pair = Pair(Tagger, stages, microbatches)
    kept: list[int] = []
    run = Executor.run

    def watched(self: Executor, actions: Any, step: Step) -> None:
        run(self, actions, step)
        if not step.training:
            kept.append(len(step._in_flight))

    with counting() as counts, mock.patch.object(Executor, "run", watched):
        for epoch in range(2):
            for rows, length in ((8, 5), (5, 5), (8, 3)):
                for model in pair.both():
                    calm(model)
                pair.check(tokens(rows, length, epoch))
            for model in pair.both():
                model.eval()
            with torch.no_grad():
                pair.check(tokens(6, 5, epoch))
            with torch.inference_mode():
                pair.check(tokens(7, 5, epoch))
            pair.check(tokens(4, 5, epoch))  # gradients, but no dropout
            if epoch == 0:
                first = counts.captures
        # Two lengths to train, one to evaluate.
        assert (first, counts.captures, counts.plans) == (3, 3, 1)
    assert kept
    assert not any(kept)
    pair.wrapped.undeploy()


@pytest.mark.parametrize(("world", "stages", "microbatches"), [(2, 2, 2), (2, 1, 2)])
def test_modes_and_shapes_come_and_go(
    pools: Pools, world: int, stages: int, microbatches: int
) -> None:
    pools.run(world, epochs, stages, microbatches)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "stages", "microbatches"), [(1, 1, 1), (1, 1, 4), (4, 2, 2), (4, 4, 4), (4, 1, 1)]
)
def test_modes_and_shapes_come_and_go_in_every_way(
    pools: Pools, world: int, stages: int, microbatches: int
) -> None:
    pools.run(world, epochs, stages, microbatches)


def freeze() -> None:
    pair = Pair(Tagger, 2, 2)
    with counting() as counts:
        for frozen in (("head",), (), ("embedding", "body.0"), ("head",)):
            for model in pair.both():
                calm(model)
                for name, parameter in pair.bare.named_parameters():
                    parameter.requires_grad_(not name.startswith(frozen))
                for name, parameter in pair.wrapped.named_parameters(from_global=True):
                    parameter.requires_grad_(not name.startswith(frozen))
            pair.check(tokens(8, 5))
            with torch.no_grad():
                pair.check(tokens(8, 5))
        assert (counts.captures, counts.plans) == (3, 1)  # the last is as the first
    pair.wrapped.undeploy()


def test_parameters_are_frozen_and_trained_again(pools: Pools) -> None:
    pools.run(2, freeze)


def disagree(change: str) -> None:
    model = make()
    wrapped = pyrannc.RaNNCModule(model, config=config(2, 1))
    calm(wrapped)
    wrapped(share(tokens(4, 5)))
    if pyrannc.get_rank() == 1:
        if change == "mode":
            model.body.train(mode=False)
        else:
            model.head.requires_grad_(requires_grad=False)
    try:
        wrapped(share(tokens(4, 5)))
    finally:
        wrapped.undeploy()


@pytest.mark.parametrize(
    ("change", "told"), [("mode", "eval mode for .*`body`"), ("frozen", "`head.weight`.* frozen")]
)
def test_processes_in_different_modes_are_told(pools: Pools, change: str, told: str) -> None:
    for outcome in pools.outcomes(2, disagree, change):
        assert outcome.kind == "MismatchError"
        assert "switch train()/eval(), requires_grad, no_grad()" in outcome.message
        assert re.search(told, outcome.message)


def without_dropout() -> None:
    pair = Pair(Tagger, 2, 2)
    calm(pair.bare)
    pair.wrapped.train()
    pair.wrapped.model.norm.eval()
    pair.wrapped.enable_dropout(False)
    pair.check(tokens(8, 5))
    pair.wrapped.enable_dropout(True)
    noisy = pair.wrapped(share(tokens(8, 5)))[0]
    assert not torch.allclose(noisy, share(pair.bare(tokens(8, 5))[0]))
    for model in pair.both():
        model.eval()
    pair.check(tokens(8, 5))
    pair.wrapped.enable_dropout(True)
    assert not torch.allclose(pair.wrapped(share(tokens(8, 5))), share(pair.bare(tokens(8, 5))))
    pair.wrapped.undeploy()


def test_dropout_alone_is_switched(pools: Pools) -> None:
    pools.run(2, without_dropout)


class Deep(nn.Module):
    """Doubles or keeps each row, after timm's and torchvision's manner."""

    def __init__(self) -> None:
        super().__init__()
        drop = pytest.importorskip("timm.layers").DropPath
        depth = pytest.importorskip("torchvision.ops").StochasticDepth
        self.first, self.second = drop(0.5), depth(0.5, "row")
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.scale
        x = x + self.first(x)
        return x + self.second(x)


def stochastic_depth() -> set[float]:
    pair = Pair(Deep, 1, 2)
    for model in pair.both():
        model.eval()
    pair.check(torch.randn(8, 3, dtype=torch.float64))
    pair.wrapped.train()
    x = torch.ones(16, 3, dtype=torch.float64)
    with counting() as counts:
        outputs = pair.wrapped(x)
        outputs.sum().backward()
        again = pair.wrapped(x)
        assert counts.captures == 0
    assert not torch.equal(outputs, again)
    assert torch.equal(outputs, outputs[:, :1].expand_as(outputs))  # a row is one draw
    pair.wrapped.undeploy()
    return set(outputs[:, 0].tolist())


def test_stochastic_depth_draws_for_each_row(pools: Pools) -> None:
    seen: set[float] = set.union(*pools.run(2, stochastic_depth))
    assert seen <= {1.0, 3.0, 9.0}
    assert len(seen) > 1


class Detector(nn.Module):
    """Needs targets to train, and takes none to evaluate."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))

    def forward(self, x: Tensor, target: Tensor | None = None) -> Tensor:
        if self.training and target is None:
            raise ValueError("targets should be given in training")
        scores = self.layers(x)
        return F.mse_loss(scores, target) if self.training else scores


def evaluate_first() -> None:
    pair = Pair(Detector, 2, 2)
    x, y = torch.randn(8, 4, dtype=torch.float64), torch.randn(8, 2, dtype=torch.float64)
    for model in pair.both():
        model.eval()
    with counting() as counts, torch.no_grad():
        pair.check(x)
    assert counts.plans == 1
    for model in pair.both():
        model.train()
    loss = pair.wrapped(share(x), share(y))
    torch.testing.assert_close(loss, pair.bare(x, y), **EXACT)
    loss.backward()
    pair.wrapped.undeploy()


def test_the_first_call_may_be_one_that_training_does_not_allow(pools: Pools) -> None:
    pools.run(2, evaluate_first)


class Mixing(nn.Module):
    """Compares the rows of a batch with each other in one of its modes."""

    def __init__(self, *, in_training: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)
        self.in_training = in_training

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        if self.training == self.in_training:
            x = x * torch.softmax(x, 0)
        return self.second(x)


class MixingInTraining(Mixing):
    def __init__(self) -> None:
        super().__init__(in_training=True)


class MixingInEvaluation(Mixing):
    def __init__(self) -> None:
        super().__init__(in_training=False)


def mix_in_one_mode(module: type[Mixing], stages: int, microbatches: int) -> None:
    for modes in ((True, False, True), (False, True, False)):
        pair = Pair(module, stages, microbatches)
        for training in modes:
            for model in pair.both():
                model.train(training)
            pair.check(torch.randn(7, 4, dtype=torch.float64, generator=torch.Generator()))
        pair.wrapped.undeploy()


@pytest.mark.parametrize(
    ("world", "module", "stages", "microbatches"),
    [
        (2, MixingInEvaluation, 1, 2),
        (2, MixingInEvaluation, 2, 3),
        (2, MixingInTraining, 2, 1),
        (4, MixingInEvaluation, 2, 2),
        (4, MixingInEvaluation, 1, 1),
    ],
)
def test_a_batch_stays_whole_in_the_mode_that_needs_it(
    pools: Pools, world: int, module: type[Mixing], stages: int, microbatches: int
) -> None:
    pools.run(world, mix_in_one_mode, module, stages, microbatches)


def many_lengths() -> None:
    with mock.patch.object(variants, "MOST_VARIANTS", 2), counting() as counts:
        pair = Pair(Tagger, 2, 1)
        for model in pair.both():
            calm(model)
        for length in (3, 4, 5, 3, 3):
            pair.check(tokens(4, length))
        assert len(pair.wrapped._runtime._variants._recent.items()) == 2
        assert (counts.captures, counts.plans) == (4, 1)  # length 3 is forgotten once
        pair.wrapped.undeploy()


def test_few_of_many_lengths_are_kept(pools: Pools) -> None:
    pools.run(2, many_lengths)
