"""A loss and its gradients are on every process those of one device with the whole batch."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pyrannc
from tests.gloo.layouts import config, share

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tests.gloo.pool import Pools

pytestmark = [pytest.mark.gloo]
EXACT = {"rtol": 1e-10, "atol": 1e-12}


def masked_mean(logits: Tensor, labels: Tensor) -> Tensor:
    mask = labels >= 0
    losses = F.cross_entropy(logits.transpose(1, 2), labels.clamp(min=0), reduction="none")
    return (losses * mask).sum() / mask.sum().clamp(min=1)


def pretraining(logits: Tensor, labels: Tensor) -> Tensor:
    """As BERT's: masked tokens, and one class for each row."""
    masked = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-1)
    return masked + 0.5 * F.cross_entropy(logits[:, 0, :2], labels[:, 0] % 2)


def weighted(logits: Tensor, labels: Tensor) -> Tensor:
    weight = torch.arange(1.0, 6.0, dtype=logits.dtype)
    return 2 + F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), weight, ignore_index=-1, label_smoothing=0.1
    )


def balanced(logits: Tensor, labels: Tensor) -> Tensor:
    """As in mixtures of experts: a product of means over tokens, which is no sum."""
    chosen = logits.softmax(-1)
    load = (chosen * (labels >= 0).unsqueeze(-1)).mean((0, 1)) @ chosen.mean((0, 1))
    return pretraining(logits, labels) + 0.1 * load


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "masked mean": masked_mean,
    "pretraining": pretraining,
    "weighted": weighted,
    "sum": lambda x, y: (
        0.1 * F.cross_entropy(x.transpose(1, 2), y, ignore_index=-1, reduction="sum")
    ),
    "batchmean": lambda x, y: F.kl_div(
        x.log_softmax(-1), x.detach().flip(-1).softmax(-1), reduction="batchmean"
    ),
    "rows": lambda x, y: x.square().mean((1, 2)).mean(),
}
UNSPLITTABLE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "root": lambda x, y: x.square().mean().sqrt(),
    "balanced": balanced,
}


class Scored(nn.Module):
    """Classes for tokens, and a loss of them."""

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor] | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(9, 6)
        self.body = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 5))
        self.loss = loss

    def forward(self, tokens: Tensor, labels: Tensor | None = None) -> Tensor:
        logits = self.body(self.embedding(tokens))
        return logits if self.loss is None or labels is None else self.loss(logits, labels)


def batch(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Ever fewer labels from row to row: parts of a batch have different numbers of them."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 9, (rows, 4), generator=generator)
    labels = torch.randint(0, 5, (rows, 4), generator=generator)
    ignored = torch.rand(rows, 4, generator=generator) < torch.linspace(0, 1, rows)[:, None]
    labels[ignored] = -1
    labels[:, 0].clamp_(min=0)
    return tokens, labels


def same_gradients(wrapped: Any, bare: nn.Module) -> None:
    for name, parameter in bare.named_parameters():
        torch.testing.assert_close(wrapped.get_param_grad(name), parameter.grad, **EXACT)


def returned(names: list[str], stages: int, microbatches: int) -> list[bool]:
    split = []
    for name in names:
        loss = {**LOSSES, **UNSPLITTABLE}[name]
        bare = Scored(loss).double()
        wrapped: Any = pyrannc.RaNNCModule(
            Scored(loss).double(), config=config(stages, microbatches)
        )
        for rows in (8, 5):
            tokens, labels = batch(rows, rows)
            bare.zero_grad()
            wrapped.zero_grad()
            expected, given = bare(tokens, labels), wrapped(share(tokens), share(labels))
            torch.testing.assert_close(given, expected, **EXACT)
            (3 * expected).backward()
            (3 * given).backward()
            same_gradients(wrapped, bare)
        split.append(wrapped.deployment.microbatches > 1)
        wrapped.undeploy()
    return split


@pytest.mark.parametrize("name", LOSSES)
def test_returned_losses_are_those_of_the_whole_batch(pools: Pools, name: str) -> None:
    assert all(pools.run(2, returned, [name], 2, 4)[0])


@pytest.mark.parametrize("name", UNSPLITTABLE)
def test_what_is_no_sum_is_computed_at_once(pools: Pools, name: str) -> None:
    assert not any(pools.run(2, returned, [name], 2, 0)[0])


@pytest.mark.slow
@pytest.mark.parametrize(("world", "stages", "microbatches"), [(1, 1, 4), (4, 2, 2), (4, 1, 2)])
@pytest.mark.parametrize("name", LOSSES)
def test_returned_losses_in_every_way(
    pools: Pools, name: str, world: int, stages: int, microbatches: int
) -> None:
    pools.run(world, returned, [name], stages, microbatches)


def outside(stages: int) -> None:
    bare = Scored(None).double()
    wrapped: Any = pyrannc.RaNNCModule(Scored(None).double(), config=config(stages, 2))
    for rows in (8, 5):
        tokens, labels = batch(rows, rows)
        labels[rows // 2 + 1 :] = -1  # the last process has few, or none
        bare.zero_grad()
        wrapped.zero_grad()
        own = share(labels)
        expected = F.cross_entropy(bare(tokens).transpose(1, 2), labels, ignore_index=-1)
        given = F.cross_entropy(wrapped(share(tokens)).transpose(1, 2), own, ignore_index=-1)
        weight = wrapped.set_loss_weight((own >= 0).sum())
        expected.backward()
        given.backward()
        same_gradients(wrapped, bare)
        counted = given.detach() * weight if weight else torch.zeros_like(given)
        total = wrapped._runtime.comm.all_reduce(counted.clone().detach())
        torch.testing.assert_close(total, expected.detach(), **EXACT)
    with pytest.raises(pyrannc.RaNNCError, match="needed numbers of at least 0"):
        wrapped.set_loss_weight(0)
    with pytest.raises(pyrannc.RaNNCError, match="needed numbers of at least 0"):
        wrapped.set_loss_weight(-1.0 if pyrannc.get_rank() else 2.0)
    wrapped.undeploy()
    summed: Any = pyrannc.RaNNCModule(
        Scored(None).double(), loss_reduction="sum", config=config(stages, 2)
    )
    with pytest.raises(pyrannc.RaNNCError, match='loss_reduction="sum"'):
        summed.set_loss_weight(1)
    summed.undeploy()


@pytest.mark.parametrize("stages", [1, 2])
def test_losses_outside_of_the_model_are_weighted(pools: Pools, stages: int) -> None:
    pools.run(2, outside, stages)


def local_mean(losses: list[Tensor], labels: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The mean over targets of several batches together, and how many there are."""
    counted = sum((label >= 0).sum() for label in labels)
    assert isinstance(counted, Tensor)
    return sum(losses, torch.zeros(())) / counted.clamp(min=1), counted


def summed(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-1, reduction="sum")


def twice(stages: int) -> None:
    """Two calls before one backward, then a step whose losses are means over rows again."""
    bare = Scored(None).double()
    wrapped: Any = pyrannc.RaNNCModule(Scored(None).double(), config=config(stages, 2))
    batches = [batch(8, 1), batch(5, 2)]
    parts = [(share(tokens), share(labels)) for tokens, labels in batches]
    expected, _ = local_mean([summed(bare(x), y) for x, y in batches], [y for _, y in batches])
    given, counted = local_mean([summed(wrapped(x), y) for x, y in parts], [y for _, y in parts])
    wrapped.set_loss_weight(counted)
    expected.backward()
    given.backward()
    same_gradients(wrapped, bare)
    for model, (tokens, _) in ((bare, batches[1]), (wrapped, parts[1])):
        model.zero_grad()
        model(tokens).square().mean().backward()
    same_gradients(wrapped, bare)
    wrapped.undeploy()


@pytest.mark.parametrize("stages", [1, 2])
def test_a_weight_is_for_all_calls_of_a_backward(pools: Pools, stages: int) -> None:
    pools.run(2, twice, stages)


def layers(width: int, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, width)).double()


def chained(stages: int, first_reduction: str) -> None:
    """A model that judges what another one makes: the loss's weight is that of both."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(7, 4, generator=generator, dtype=torch.float64)
    labels = torch.tensor([1, 0, 1, -1, -1, 0, -1])
    bare = [layers(4, 0), layers(2, 1)]
    reductions = (first_reduction, "mean")
    wrapped: list[Any] = [
        pyrannc.RaNNCModule(model, loss_reduction=reduction, config=config(stages, 2))
        for model, reduction in zip([layers(4, 0), layers(2, 1)], reductions, strict=True)
    ]
    for step in range(2):
        # A loss of its own makes no sense for the first model where its gradients are sums.
        both = step == 1 and first_reduction == "mean"
        for make, judge, rows, targets in (
            (*bare, x, labels),
            (*wrapped, share(x), share(labels)),
        ):
            made = make(rows)
            loss = F.cross_entropy(judge(made), targets, ignore_index=-1)
            if judge is wrapped[1]:
                count = (targets >= 0).sum()
                judge.set_loss_weight(count)
                if both:
                    make.set_loss_weight(count)
            if both:
                loss = loss + (made.square().mean(1) * (targets >= 0)).sum() / (targets >= 0).sum()
            make.zero_grad()
            judge.zero_grad()
            loss.backward()
        for ours, theirs in zip(wrapped, bare, strict=True):
            same_gradients(ours, theirs)
    for model in wrapped:
        model.undeploy()


@pytest.mark.parametrize(("stages", "first"), [(1, "mean"), (2, "mean"), (2, "sum")])
def test_a_weight_reaches_a_model_through_another(pools: Pools, stages: int, first: str) -> None:
    pools.run(2, chained, stages, first)


# ---- Losses whose reduction is stated


def noted(logits: Tensor, labels: Tensor) -> Tensor:
    """A mean that the analysis can tell, and a term whose reduction it cannot."""
    return masked_mean(logits, labels) + 0.1 * imbalance(logits)


def imbalance(logits: Tensor) -> Tensor:
    chosen = logits.softmax(-1).mean((0, 1))
    return chosen @ chosen.roll(1)


class Told(Scored):
    """Returns two losses and the logits."""

    def forward(self, tokens: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.body(self.embedding(tokens))
        assert labels is not None
        spread = logits.flatten(1)
        pairs = spread @ spread.T  # each row with each other
        return {
            "loss": masked_mean(logits, labels) + 0.1 * imbalance(logits),
            "parts": (pairs.logsumexp(1).sum(), logits.square().mean().sqrt()),
            "logits": logits,
        }


STATED = {"loss": "mean", "parts.0": "sum", "parts.1": "mean"}


def stated_by_hand(
    model: nn.Module, tokens: Tensor, labels: Tensor, parts: Sequence[list[int]]
) -> Tensor:
    """Of what can be told that of all rows, of the rest the mean or sum of the parts."""
    total = 0.5 * masked_mean(model(tokens, labels)["logits"], labels)
    for rows in parts:
        weight = len(rows) / len(tokens)
        outputs = model(tokens[rows], labels[rows])
        mean = 0.05 * imbalance(outputs["logits"]) + outputs["parts"][1]
        total = total + weight * mean + 0.01 * outputs["parts"][0]
    return total


PARTS = {
    (1, 1): ([[0, 1, 2, 3], [4, 5, 6, 7]], [[0, 1, 2], [3, 4]]),
    (2, 1): ([[0, 1, 2, 3], [4, 5, 6, 7]], [[0, 1, 2], [3, 4]]),
    (2, 2): ([[0, 1, 4, 5], [2, 3, 6, 7]], [[0, 1, 3], [2, 4]]),
}
"""By processes and stages, which rows of a batch of 8 and of 5 are computed together.

Microbatches have rows of all processes; a replica has those of its own process.
"""


def state_reductions(stages: int, microbatches: int) -> None:
    bare = Told(None).double()
    wrapped: Any = pyrannc.RaNNCModule(
        Told(None).double(), output_reduction=STATED, config=config(stages, microbatches)
    )
    for rows, parts in zip((8, 5), PARTS[pyrannc.get_world_size(), stages], strict=True):
        tokens, labels = batch(rows, rows)
        bare.zero_grad()
        wrapped.zero_grad()
        expected = stated_by_hand(bare, tokens, labels, parts)
        outputs = wrapped(share(tokens), share(labels))
        given = 0.5 * outputs["loss"] + outputs["parts"][1] + 0.01 * outputs["parts"][0]
        torch.testing.assert_close(given, expected, **EXACT)
        expected.backward()
        given.backward()
        same_gradients(wrapped, bare)
    assert wrapped.deployment.microbatches == microbatches
    wrapped.undeploy()


@pytest.mark.parametrize(("world", "stages", "microbatches"), [(2, 2, 2), (1, 1, 2), (2, 1, 1)])
def test_a_stated_reduction_splits_the_batch(
    pools: Pools, world: int, stages: int, microbatches: int
) -> None:
    pools.run(world, state_reductions, stages, microbatches)


def test_a_loss_that_cannot_be_told_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    tokens, labels = batch(6, 1)
    for reduction, warned in ((None, True), ("mean", False)):
        caplog.clear()
        wrapped: Any = pyrannc.RaNNCModule(
            Scored(noted).double(), output_reduction=reduction, config=config(1, 0)
        )
        wrapped(tokens, labels)
        told = "`aten.roll.default` in the model" in caplog.text
        assert told == warned
        assert ("the argument `output_reduction`" in caplog.text) == warned
        wrapped.undeploy()


def force_parts(items: dict[str, int], folder: str) -> None:
    """Asks for parts of a batch that cannot be split: of the planner, then with a deployment."""
    x, y = (share(tensor) for tensor in batch(8, 1))
    settings = config(1, 0)
    whole: Any = pyrannc.RaNNCModule(Scored(noted).double(), config=settings)
    whole(x, y)
    path = Path(folder) / "deployment.json"
    whole.save_deployment(path)
    whole.undeploy()
    if pyrannc.get_rank() == 0:
        plan = json.loads(path.read_text())
        plan["microbatches"] = 2
        path.write_text(json.dumps(plan))
    pyrannc.barrier()
    forced = pyrannc.RaNNCModule(
        Scored(noted).double(), config=dataclasses.replace(settings, **items)
    )
    loaded = pyrannc.RaNNCModule(Scored(noted).double(), load_deployment=path, config=settings)
    for model, kind in ((forced, pyrannc.PlanError), (loaded, pyrannc.DeploymentError)):
        with pytest.raises(kind, match=r"cannot be split.*`aten\.roll\.default`") as caught:
            model(x, y)
        found, hint = str(caught.value).split("\nhint: ")
        assert "microbatch" in found
        assert "the argument `output_reduction`" in hint
        model.undeploy()


@pytest.mark.parametrize(("world", "items"), [(1, {"pipeline_num": 2}), (2, {"replica_num": 2})])
def test_parts_of_what_cannot_be_split_are_refused(
    pools: Pools, world: int, items: dict[str, int], tmp_path: Path
) -> None:
    pools.run(world, force_parts, items, str(tmp_path))


def test_what_cannot_be_stated_is_refused() -> None:
    tokens, labels = batch(6, 1)
    with pytest.raises(pyrannc.RaNNCError, match='has \'max\', needed "mean" or "sum"'):
        pyrannc.RaNNCModule(Told(None), output_reduction={"loss": "max"})
    for name, found in (("logits", "has rows"), ("losses", "none of the model's results")):
        wrapped: Any = pyrannc.RaNNCModule(
            Told(None).double(), output_reduction={name: "mean"}, config=config(1, 0)
        )
        with pytest.raises(pyrannc.RaNNCError, match=f"for `{name}`, which .*{found}") as caught:
            wrapped(tokens, labels)
        assert "`loss`, `parts.0`, `parts.1`, `logits`" in str(caught.value)
        wrapped.undeploy()
