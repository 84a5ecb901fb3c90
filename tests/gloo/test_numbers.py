"""Numbers that change from call to call: what they cost, and that no call uses an earlier one's."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import pyrannc
from pyrannc import deployment
from tests.gloo.layouts import config, share
from tests.gloo.test_equivalence import EXACT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from tests.gloo.pool import Pools

pytestmark = [pytest.mark.gloo]

FACTOR = 1.0
FLOATS = (0.9, 0.8, 0.7, 1.3, 0.25)
COUNTS = (1, 2, 13, 50, 101)


class Settings:
    """What a script sets."""

    def __init__(self) -> None:
        self.scale = 1.0


class Given(nn.Module):
    """Two layers, and something with a number between and behind them."""

    share = 1.0

    def __init__(self, change: str) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 4)
        self.change, self.settings = change, Settings()
        self.temperature, self.options = 1.0, {"weights": [1.0, 1.0]}
        self.step, self.noted, self.total, self.average = 0, 0.0, 0, 1.0

    def forward(self, x: torch.Tensor, v: Any = None, tau: float = 1.0) -> torch.Tensor:
        hidden, back = CHANGES[self.change](self, torch.tanh(self.first(x)) / tau, v)
        if back is None:
            return hidden
        return self.last(hidden) * back * FACTOR


def scheduled(model: Given, y: torch.Tensor, step: int) -> Any:
    del model
    return y * min(1.0, step / 20), 0.5 ** (step // 10) + math.cos(math.pi * step / 100)


def in_operators(model: Given, y: torch.Tensor, v: float) -> Any:
    del model
    y = torch.lerp(y, y.clamp(max=v), v).masked_fill(y > v, v) + torch.full((6,), v)
    y = torch.where(y > v, y, v).abs() ** v + (v - y) * math.exp(-v)
    return functional.leaky_relu(y, v), torch.tensor([v, 1.0, v * v, 2.0], dtype=torch.float64)


def counted(model: Given, y: torch.Tensor, v: None) -> Any:
    del v
    model.step += 1
    model.noted = model.step / 4
    model.average = model.average * 0.9 + model.step
    return y * 0.9**model.step, model.average


def totalled(model: Given, y: torch.Tensor, v: int) -> Any:
    model.total += v
    return y + v, torch.tensor(v)


def held(model: Given, y: torch.Tensor, v: None) -> Any:
    del v
    weights = model.options["weights"]
    return y / model.temperature * model.settings.scale, weights[1] * model.share


def lost(model: Given, y: torch.Tensor, v: float) -> Any:
    loss = functional.smooth_l1_loss(model.last(y), y[:, :4] * 0, beta=v)
    return loss + v * 3 - (y * y).sum() / (y.shape[0] * v), None


def nested(model: Given, y: torch.Tensor, settings: dict[str, Any]) -> Any:
    del model
    return y * settings["a"][0], settings["b"]


CHANGES: dict[str, Callable[..., Any]] = {
    "scheduled": scheduled,
    "in_operators": in_operators,
    "counted": counted,
    "totalled": totalled,
    "held": held,
    "lost": lost,
    "nested": nested,
    "parity": lambda model, y, v: (y * 2 if v % 2 else y, 1),
    "columns": lambda model, y, v: (y, y[:, :v].sum(1, keepdim=True)),
    "table": lambda model, y, v: (y, [1.0, 1.0, 1.0, 2.0, 3.0][v]),
    "asked": lambda model, y, v: (y, 2 * v if isinstance(v, float) else 1.0),
    "text": lambda model, y, v: (y, float(f"{v}")),
    "flag": lambda model, y, v: (y if v is None else y * v, 2.0 if v is True else 1.0),
}


def hold(model: Given, value: float) -> tuple[Any, ...]:
    model.temperature, model.settings.scale = value, 1 + value
    model.options["weights"][1] = 2 * value
    Given.share = value / 2
    globals().update(FACTOR=value)
    return ()


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    yield
    hold(Given("held"), 1.0)
    Given.share = 1.0


def plain(model: Given) -> list[Any]:
    return [model.step, model.noted, model.total, model.average, model.temperature]


def compare(
    change: str, calls: Sequence[tuple[Any, ...]] | None, captures: int, stages: int, warning: str
) -> None:
    """Trains, and counts how often the model is captured."""
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.manual_seed(0)
    bare = Given(change).double()
    torch.manual_seed(0)
    model = Given(change).double()
    mine = torch.optim.SGD(model.parameters(), lr=0.1)
    theirs = torch.optim.SGD(bare.parameters(), lr=0.1)
    wrapped = pyrannc.RaNNCModule(model, mine, config=config(stages, 2))
    capture, counts, heard = deployment.capture, [], _Heard()
    deployment.capture = lambda *args, **kwargs: counts.append(1) or capture(*args, **kwargs)
    logging.getLogger("pyrannc").addHandler(heard)
    try:
        for number in range(6):
            for kind, inner, optimizer, batch in (
                (bare, bare, theirs, x),
                (wrapped, model, mine, share(x)),
            ):
                given = () if calls is None else calls[number % len(calls)]
                if change == "held":
                    given = hold(inner, FLOATS[number % len(FLOATS)])
                result = kind(batch, *given)
                optimizer.zero_grad()
                result.square().mean().backward()
                optimizer.step()
                if kind is bare:
                    expected = result
            torch.testing.assert_close(
                result, share(expected) if expected.dim() else expected, **EXACT
            )
            assert plain(model) == pytest.approx(plain(bare), rel=1e-12)
    finally:
        deployment.capture = capture
        logging.getLogger("pyrannc").removeHandler(heard)
    assert len(counts) == captures
    assert any(warning in text for text in heard.texts) == bool(warning), heard.texts
    wrapped.undeploy()


class _Heard(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "captured again" in record.getMessage():
            self.texts.append(record.getMessage())


INPUTS = [
    ("scheduled", [(step, value) for step, value in zip(COUNTS, FLOATS, strict=True)], 3, ""),
    ("in_operators", [(value,) for value in FLOATS], 2, ""),
    ("counted", None, 2, ""),
    ("totalled", [(value,) for value in COUNTS], 2, ""),
    ("held", None, 2, ""),
    ("lost", [(value,) for value in FLOATS], 2, ""),
    ("nested", [({"a": [v], "b": v + 1},) for v in FLOATS], 2, ""),
    ("parity", [(1,), (2,), (3,), (4,), (5,)], 3, ""),
]
DECIDING = [
    ("columns", [(2,), (1,), (3,)], 4, "`v` is a number that decides"),
    ("table", [(0,), (1,), (2,), (3,), (4,)], 6, "`v` is a number that decides"),
    ("asked", [(0.5,), (0.25,), (0.75,)], 4, "`v` is a number that decides"),
    ("text", [(0.5,), (0.25,), (0.75,)], 4, "`v` is a number that decides"),
    ("flag", [(None,), (True,), (False,), (0.5,), (0.75,)], 5, ""),
]


@pytest.mark.parametrize(("change", "calls", "captures", "warning"), [*INPUTS, *DECIDING])
def test_numbers_of_one_process(
    pools: Pools, change: str, calls: Any, captures: int, warning: str
) -> None:
    pools.run(1, compare, change, calls, captures, 1, warning)


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("index", [0, 2, 4, 5])
def test_numbers_of_all_stages_and_microbatches(pools: Pools, stages: int, index: int) -> None:
    change, calls, captures, warning = INPUTS[index]
    pools.run(2, compare, change, calls, captures, stages, warning)


def differ() -> None:
    torch.manual_seed(0)
    wrapped = pyrannc.RaNNCModule(Given("totalled"), config=config(2))
    for value in (1, 2, 3):
        wrapped(torch.randn(4, 4), value)
    told = "models: `v` is 0 on rank 0 and 1 on rank 1"
    with pytest.raises(pyrannc.RaNNCError, match=told):
        wrapped(torch.randn(4, 4), pyrannc.get_rank())
    wrapped.undeploy()


def test_other_numbers_on_another_process_are_told(pools: Pools) -> None:
    pools.run(2, differ)
