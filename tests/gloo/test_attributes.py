"""What a forward leaves in plain attributes: as one call of the bare model would have left it."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import pyrannc
from tests.gloo.layouts import Layout, config, deployment, share
from tests.gloo.test_equivalence import EXACT

if TYPE_CHECKING:
    from pathlib import Path

    from tests.gloo.pool import Pools

pytestmark = [pytest.mark.gloo]


class Annealed(nn.Module):
    """Between two layers something that depends on how many calls there were, in steps of two."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 4)
        self.calls = self.evaluations = 0
        self._warm = False
        self.width: int | None = None
        self.seen: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.calls += 1
            self._warm = self._warm or self.calls > 2
        else:
            self.evaluations += 1
        self.width = x.shape[1]
        self.seen = torch.tanh(self.first(x))
        hidden = self.seen / self.width if self._warm else self.seen
        return self.last(hidden) * (1 + self.calls // 2)


class Alternating(nn.Module):
    """Decides by what tensors hold, so that no graph shows it, and by the number of its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.seen: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.seen = x * 2
        return self.seen if x.sum().isnan() else x * (-1) ** self.calls


class Hidden(Annealed):
    """The same around something that runs as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Alternating()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(self.inner(x))


def make(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind().double()


def plain(model: Any) -> list[Any]:
    inner = [model.inner.calls] if hasattr(model, "inner") else []
    return [model.calls, model.evaluations, model._warm, model.width, *inner]


def anneal(kind: type[nn.Module], layout: Layout, folder: str) -> None:
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    bare, model = make(kind), make(kind)
    mine = torch.optim.SGD(model.parameters(), lr=0.1)
    theirs = torch.optim.SGD(bare.parameters(), lr=0.1)
    file = deployment(lambda: make(kind), (share(x),), layout, folder)
    wrapped = pyrannc.RaNNCModule(model, mine, load_deployment=file, config=config(len(layout), 2))
    for step in range(5):
        expected = bare(x)
        found = wrapped(share(x))
        torch.testing.assert_close(found, share(expected), **EXACT)
        assert plain(model) == plain(bare)
        for optimizer, output in ((mine, found), (theirs, expected)):
            optimizer.zero_grad()
            output.square().mean().backward()
            optimizer.step()
        if step == 1:
            bare.eval(), wrapped.eval()
            with torch.no_grad():
                torch.testing.assert_close(wrapped(share(x)), share(bare(x)), **EXACT)
            bare.train(), wrapped.train()
            assert plain(model) == plain(bare)
    with pytest.raises(pyrannc.RaNNCError, match=r"`seen` is what.*\n.*have forward return it"):
        assert model.seen.sum() > 0
    if kind is Hidden:
        with pytest.raises(pyrannc.RaNNCError, match=r"`inner.seen` is what"):
            assert model.inner.seen.sum() > 0
    wrapped.undeploy()
    assert model.seen is None


LAYOUTS: list[Layout] = [((0,), (1,)), ((0,),), ((0,), (1, 2, 3)), ((0, 1),)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("kind", [Annealed, Hidden])
def test_attributes_change_as_without_rannc(
    pools: Pools, kind: type[nn.Module], layout: Layout, tmp_path: Path
) -> None:
    world = 1 + max(rank for ranks in layout for rank in ranks)
    pools.run(world, anneal, kind, layout, str(tmp_path))


class Carrying(nn.Module):
    """A recurrent model that goes on where the last call ended."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.last = nn.LSTM(4, 6, batch_first=True), nn.Linear(6, 2)
        self.state: tuple[torch.Tensor, torch.Tensor] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out, (hidden, memory) = self.cell(x, self.state)
        self.state = hidden.detach(), memory.detach()
        return self.last(out)


def carry() -> None:
    wrapped = pyrannc.RaNNCModule(Carrying(), config=config(2))
    told = r"goes on with what an earlier call left in `state`.*\n.*as an argument and return it"
    with pytest.raises(pyrannc.RaNNCError, match=told):
        wrapped(torch.ones(4, 3, 4))
    wrapped.undeploy()


def test_what_a_call_goes_on_with_is_refused(pools: Pools) -> None:
    pools.run(2, carry)


FACTOR = 1.0


class Notes:
    """What a script counts, and how it is set."""

    def __init__(self) -> None:
        self.calls = 0
        self.factor = 1.0


class Noting(nn.Module):
    """Reads settings of all kinds, and counts in containers and objects."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 4)
        self.notes, self.counts = Notes(), {"calls": 0, "steps": [0, 0]}
        self._factor, self.factors, self.shape = 1.0, [1.0], (1.0, 2.0)
        self.kept: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.notes.calls += 1
        self.counts["calls"] += 1
        self.counts["steps"][1] += 2
        hidden = torch.tanh(self.first(x)) * self.notes.factor * self._factor * self.shape[0]
        self.kept.append(hidden)
        return self.last(hidden) * sum(self.factors) * FACTOR


class NotingWhole(Noting):
    """The same around something that runs as it is and counts, too."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Counting()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(super().forward(x))


class Counting(nn.Module):
    """Decides by what tensors hold, and reads and counts what it keeps in a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = {"calls": 0}
        self.kept: list[float] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.counts["calls"] += 1
        self.kept.append(float(x.detach().mean()))
        return x if x.sum().isnan() else x * self.counts["calls"]


SETTINGS = [
    lambda model: setattr(model.notes, "factor", 2.0),
    lambda model: setattr(model, "_factor", 0.5),
    lambda model: model.factors.append(0.5),
    lambda model: setattr(model, "shape", (0.5, 1.0)),
    lambda model: globals().update(FACTOR=1.5),
]


def count_and_set(kind: type[nn.Module], layout: Layout, folder: str) -> None:
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    bare, model = make(kind), make(kind)
    globals().update(FACTOR=1.0)
    mine = torch.optim.SGD(model.parameters(), lr=0.1)
    theirs = torch.optim.SGD(bare.parameters(), lr=0.1)
    file = deployment(lambda: make(kind), (share(x),), layout, folder)
    wrapped = pyrannc.RaNNCModule(model, mine, load_deployment=file, config=config(len(layout), 2))
    kept = model.kept
    for change in [*SETTINGS, lambda model: None]:
        expected, found = bare(x), wrapped(share(x))
        torch.testing.assert_close(found, share(expected), **EXACT)
        assert (vars(model.notes), model.counts) == (vars(bare.notes), bare.counts)
        if kind is NotingWhole:
            assert model.inner.counts == bare.inner.counts
        for optimizer, output in ((mine, found), (theirs, expected)):
            optimizer.zero_grad()
            output.square().mean().backward()
            optimizer.step()
        change(bare), change(model)
    with pytest.raises(pyrannc.RaNNCError, match=r"`kept` is what.*\n.*have forward return it"):
        model.kept.clear()
    wrapped.undeploy()
    assert model.kept is kept
    assert kept == []


@pytest.mark.parametrize("layout", LAYOUTS[:3], ids=str)
@pytest.mark.parametrize("kind", [Noting, NotingWhole])
def test_settings_and_counters_in_containers_and_objects(
    pools: Pools, kind: type[nn.Module], layout: Layout, tmp_path: Path
) -> None:
    world = 1 + max(rank for ranks in layout for rank in ranks)
    pools.run(world, count_and_set, kind, layout, str(tmp_path))


class Totalling(nn.Module):
    """Counts by what tensors hold."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 4)
        self.inner = Positive()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.inner(self.first(x)))


class Positive(nn.Module):
    """Counts positive numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.total += int((x.detach() > 0).sum())
        return x * 2


def call_often(model: nn.Module) -> None:
    for _ in range(8):
        model(torch.randn(4, 4))


def total() -> None:
    torch.manual_seed(0)
    wrapped = pyrannc.RaNNCModule(Totalling(), config=config(2))
    with pytest.raises(pyrannc.RaNNCError, match=r"`inner.total` became .* in a part"):
        call_often(wrapped)
    wrapped.undeploy()


def test_what_depends_on_the_content_of_tensors_is_refused(pools: Pools) -> None:
    pools.run(2, total)


class Settings:
    """Of a model, as a configuration that a trainer saves."""

    def __init__(self) -> None:
        self.dtype: str | None = None
        self.factor = 1.0


class Configured(nn.Module):
    """Reads its settings, of which only one matters."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.settings = nn.Linear(4, 4), Settings()
        self.mask = torch.ones(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        factor = self.settings.factor if self.settings.dtype != "none" else 0.0
        return self.layer(x) * factor * self.mask


def change_on_one_rank() -> None:
    rank = pyrannc.get_rank()
    x = share(torch.randn(8, 4, dtype=torch.float64))
    model: Any = make(Configured)
    wrapped = pyrannc.RaNNCModule(model, config=config(1, 1))
    expected = wrapped(x)
    for dtype in ("float64", None, "float32"):
        model.settings.dtype = dtype if rank == 0 else None
        torch.testing.assert_close(wrapped(x), expected, **EXACT)
    model.mask = torch.full((4,), 1.0 + rank)
    with pytest.raises(pyrannc.MismatchError, match=r"the tensor `mask` holds other values"):
        wrapped(x)
    wrapped.undeploy()
    model = make(Configured)
    wrapped = pyrannc.RaNNCModule(model, config=config(1, 1))
    model.settings.dtype = "float32" if rank == 0 else None
    wrapped(x)
    model.settings.factor = 2.0 + rank
    told = r"models: `settings.factor` is 2.0 on rank 0 and 3.0 on rank 1\n"
    with pytest.raises(pyrannc.MismatchError, match=told):
        wrapped(x)
    wrapped.undeploy()


def test_attributes_may_differ_where_they_change_nothing(pools: Pools) -> None:
    pools.run(2, change_on_one_rank)


def use_what_was_kept() -> None:
    x = share(torch.randn(8, 4, dtype=torch.float64))
    model: Any = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3))).double()
    kept: dict[str, Any] = {}
    elsewhere: Any = functools.lru_cache(lambda: [])  # what nobody can follow
    model[1].register_forward_hook(lambda module, args, output: kept.update(middle=output))
    model[1].register_forward_hook(lambda module, args, output: elsewhere().append(output))
    wrapped = pyrannc.RaNNCModule(model, config=config(2, 1))
    output = wrapped(x)
    with pytest.raises(pyrannc.RaNNCError, match=r"`kept\['middle'\]` is what.*\n.*return it"):
        output.mean() + kept["middle"].mean()
    with pytest.raises(pyrannc.RaNNCError, match=r"the loss comes from a tensor without data"):
        (output.mean() + elsewhere()[0].mean()).backward()
    output.mean().backward()
    with pytest.raises(pyrannc.RaNNCError, match=r"an argument comes from a tensor without data"):
        wrapped(elsewhere()[0])
    wrapped.undeploy()


def test_what_hooks_keep_never_reaches_another_process(pools: Pools) -> None:
    pools.run(2, use_what_was_kept)
