"""What a forward changes in lists, dictionaries, objects and outside of the model."""

from __future__ import annotations

import copy
import dataclasses
import enum
import functools
import itertools
import logging
import pickle
import random
import types
from collections import OrderedDict, defaultdict, deque
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pyrannc import _watched
from pyrannc._form import Form
from pyrannc._places import GONE, Absent, Item
from pyrannc._side_effects import Left, Rewinding
from pyrannc._snapshot import Snapshot
from pyrannc.capture import capture
from pyrannc.errors import CaptureError, ExecutionError
from tests.gloo import layouts

if TYPE_CHECKING:
    from collections.abc import Callable

FACTOR = 1.0
CALLS = 0
LOGGED: list[Any] = []
ONCE: float | None = None
HANDLERS: dict[str, Callable[[], float]] = {"factor": lambda: FACTOR}


class Meter:
    """Counts, as training scripts do."""

    made: ClassVar[list[type]] = []

    def __init_subclass__(cls) -> None:
        Meter.made.append(cls)

    def __init__(self) -> None:
        self.count = 0
        self.last: Any = None

    def update(self, value: Any) -> None:
        self.count += 1
        self.last = value


class Way(enum.Enum):
    """One of two."""

    ON = "on"
    BACK = "back"


class Level(int):
    """A number of a kind of its own."""


class Closed(type):
    """Has no other class derive from its own."""

    def __new__(cls, name: str, bases: tuple[type, ...], members: dict[str, Any]) -> Any:
        if bases:
            raise TypeError("final")
        return super().__new__(cls, name, bases, members)


class Sealed(metaclass=Closed):
    """Cannot be watched."""

    def __init__(self) -> None:
        self.count = 0


class Model(nn.Module):
    """A layer and all kinds of things beside it."""

    calls = 0

    def __init__(self, function: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.function = function
        self.count: Any = 0
        self.history: list[Any] = []
        self.recent: deque[Any] = deque(maxlen=3)
        self.names = {"seen"}
        self.layers: list[Any] = [[], {"calls": 0}]
        self.notes: dict[str, Any] = {"calls": 0, "last": None}
        self.ordered = OrderedDict(first=1, second=2)
        self.meter = Meter()
        self.settings = types.SimpleNamespace(factor=1.0, calls=0)
        self.sealed = Sealed()
        self.mask = torch.ones(3)
        self.masks = {"first": torch.ones(3)}
        self.steps = itertools.count()
        self.chance = random.Random(0)
        self.dice = np.random.default_rng(0)
        self.generator = torch.Generator()

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def whole(result: Tensor) -> Tensor:
    """Has what calls it run as it is: it decides by what a tensor holds."""
    return result if result.sum().isfinite() else -result


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def _seen(model: nn.Module) -> str:
    """All that the model holds, as a text."""
    shown = {n: v for n, v in vars(model).items() if n[0] != "_" and n != "function"}
    shown |= {
        "meter": vars(shown["meter"]),
        "sealed": 0,
        "chance": 0,
        "dice": 0,
        "generator": 0,
        "steps": 0,
    }
    return repr(sorted(shown.items()))


def _left(function: Callable[[Any, Tensor], Tensor]) -> tuple[Model, Left]:
    """The model after a capture, which must leave it as it was, and what a call leaves."""
    model = Model(function)
    before, held = _seen(model), dict(vars(model))
    left = capture(model, (torch.randn(4, 3),)).left
    assert _seen(model) == before
    assert all(vars(model)[name] is value for name, value in held.items())
    return model, left


def _note(model: Any, x: Tensor) -> Tensor:
    model.notes["calls"] += 1
    model.settings.calls += 1
    model.meter.count += 2
    model.layers[1]["calls"] += 3
    return model.layer(x)


@pytest.mark.parametrize("end", [lambda result: result, whole], ids=["captured", "whole"])
def test_counters_in_containers_and_objects_are_counted(end: Callable[[Tensor], Tensor]) -> None:
    model, left = _left(lambda model, x: end(_note(model, x)))
    assert left == Left(
        counted={
            ("", "notes", Item("calls")): 1,
            ("", "settings", "calls"): 1,
            ("", "meter", "count"): 2,
            ("", "layers", Item(1), Item("calls")): 3,
        }
    )
    left.apply(model)
    left.apply(model)
    assert model.notes["calls"] == 2
    assert (model.settings.calls, model.meter.count, model.layers[1]["calls"]) == (2, 4, 6)


def test_a_counter_in_an_object_that_matters_is_state() -> None:
    def growing(model: Any, x: Tensor) -> Tensor:
        model.meter.count += 1
        return model.layer(x) * model.meter.count

    _, left = _left(growing)
    assert left == Left(state={("", "meter", "count"): 1})


def _kept_in_object(model: Any, x: Tensor) -> Tensor:
    model.meter.update(model.layer(x))
    return model.meter.last * 1


def _kept_in_dictionary(model: Any, x: Tensor) -> Tensor:
    model.notes["last"] = x
    return model.layer(x)


def _added(model: Any, x: Tensor) -> Tensor:
    model.history.append(x)
    return model.layer(x)


def _added_to_few(model: Any, x: Tensor) -> Tensor:
    model.recent.append(x.shape[1])
    return model.layer(x)


def _added_inside(model: Any, x: Tensor) -> Tensor:
    model.layers[0].append(x)
    return model.layer(x)


def _another_key(model: Any, x: Tensor) -> Tensor:
    model.notes[f"call {len(model.notes)}"] = 1
    return model.layer(x)


def _another_order(model: Any, x: Tensor) -> Tensor:
    model.ordered.move_to_end("first")
    return model.layer(x)


def _added_and_shortened(model: Any, x: Tensor) -> Tensor:
    model.history.append(x)
    if len(model.history) > 3:
        model.history.pop(0)
    return model.layer(x)


@pytest.mark.parametrize("end", [lambda result: result, whole], ids=["captured", "whole"])
@pytest.mark.parametrize(
    ("function", "name"),
    [
        (_kept_in_object, "meter"), (_kept_in_dictionary, "notes"), (_added, "history"),
        (_added_to_few, "recent"), (_added_inside, "layers"), (_another_key, "notes"),
        (_another_order, "ordered"), (_added_and_shortened, "history"),
    ],
)  # fmt: skip
def test_what_is_only_kept_is_absent(
    function: Callable[[Any, Tensor], Tensor], name: str, end: Callable[[Tensor], Tensor]
) -> None:
    model, left = _left(lambda model, x: end(function(model, x)))
    assert left.absent == (("", name),)
    left.apply(model)
    with pytest.raises(CaptureError, match=rf"`{name}` is what.*\n.*have forward return it"):
        len(getattr(model, name))
    assert capture(model, (torch.randn(4, 3),)).left == left  # it is as before while captured


def _remembering(model: Any, x: Tensor) -> Tensor:
    model.history.append(x)
    return model.layer(x) + len(model.history)


def _alternating(model: Any, x: Tensor) -> Tensor:
    model.layers[0].append(1)
    return model.layer(x) * (-1) ** len(model.layers[0])


def _of_recent(model: Any, x: Tensor) -> Tensor:
    model.recent.append(x.shape[1])
    return model.layer(x) * sum(model.recent)


def _late(model: Any, x: Tensor) -> Tensor:
    model.history.append(1)
    return model.layer(x) * (2 if len(model.history) > 500 else 1)


def _different_first(model: Any, x: Tensor) -> Tensor:
    if not hasattr(model, "table"):
        model.table = torch.arange(3.0)
        return model.layer(x)
    return model.layer(x) * model.table


def _noticing(model: Any, x: Tensor) -> Tensor:
    factor = 1 if model.meter.last is None else 2
    model.meter.last = x
    return model.layer(x) * factor


def _averaging(model: Any, x: Tensor) -> Tensor:
    mean = x.mean()
    last = model.notes["last"]
    model.notes["last"] = mean if last is None else last * 0.5 + mean * 0.5
    return model.layer(x) - model.notes["last"]


def _deleting(model: Any, x: Tensor) -> Tensor:
    if hasattr(model, "count"):
        del model.count
        return model.layer(x)
    return model.layer(x) * 2


def _iterating(model: Any, x: Tensor) -> Tensor:
    return model.layer(x) * next(model.steps)


def _drawing(model: Any, x: Tensor) -> Tensor:
    return model.layer(x) * model.chance.random()


def _throwing(model: Any, x: Tensor) -> Tensor:
    return model.layer(x) * float(model.dice.random())


@pytest.mark.parametrize("end", [lambda result: result, whole], ids=["captured", "whole"])
@pytest.mark.parametrize(
    "function",
    [
        _remembering, _alternating, _of_recent, _late, _noticing, _averaging, _deleting, _iterating,
        _drawing, _throwing,
    ],
)  # fmt: skip
def test_what_the_next_call_goes_on_with_is_refused(
    function: Callable[[Any, Tensor], Tensor], end: Callable[[Tensor], Tensor]
) -> None:
    model = Model(lambda model, x: end(function(model, x)))
    before = _seen(model)
    with pytest.raises(CaptureError, match=r"goes on with what an earlier call left.*\n.*return"):
        capture(model, (torch.randn(4, 3),))
    assert _seen(model) == before


def test_generators_of_the_model_are_refused() -> None:
    def drawing(model: Any, x: Tensor) -> Tensor:
        return model.layer(x) * torch.rand((), generator=model.generator)

    with pytest.raises(CaptureError, match=r"rand.* draws from a generator.*\n.*leave"):
        capture(Model(drawing), (torch.randn(4, 3),))
    with pytest.raises(CaptureError, match=r"goes on with what.*`generator`"):
        capture(Model(lambda model, x: whole(drawing(model, x))), (torch.randn(4, 3),))


def test_a_call_that_makes_something_must_give_what_later_ones_give() -> None:
    with pytest.raises(CaptureError, match=r"goes on with what.*`table`"):
        capture(Model(_different_first), (torch.randn(4, 3),))

    def made_once(model: Any, x: Tensor) -> Tensor:
        if not hasattr(model, "table"):
            model.table = torch.arange(3.0)
        return model.layer(x) * model.table

    model, left = _left(made_once)
    assert left == Left(absent=(("", "table"),))
    left.apply(model)
    assert type(model.table) is Absent
    capture(model, (torch.randn(5, 3),))
    assert type(copy.deepcopy(model).table) is Absent  # there was nothing before


def _cyclic(model: Any, x: Tensor) -> Tensor:
    model.count = (model.count + 1) % 3
    return whole(model.layer(x) * (model.count + 1))


def test_numbers_of_whole_parts_that_do_not_grow_evenly_are_refused() -> None:
    with pytest.raises(CaptureError, match="goes on with what an earlier call left in `count`"):
        capture(Model(_cyclic), (torch.randn(4, 3),))

    def told(model: Any, x: Tensor) -> Tensor:
        model.count = float(x.detach().mean())
        return model.layer(x)

    _, left = _left(told)
    assert left == Left(absent=(("", "count"),))


def test_a_whole_part_has_to_leave_what_was_told() -> None:
    def total(model: Any, x: Tensor) -> Tensor:
        model.count += int((x.detach() > 0).sum())
        return model.layer(x)

    x = torch.ones(4, 3)
    model = Model(total)
    left = capture(model, (x,)).left
    assert left == Left(counted={("", "count"): 12})
    rewinding = Rewinding([list(model.named_modules())], left)
    for _ in range(2):  # as two microbatches do
        with rewinding.of(1, check=True):
            model(x)
    assert model.count == 0
    told = r"`count` became 0 in a part.*\n.*return it"
    with pytest.raises(ExecutionError, match=told), rewinding.of(1, check=True):
        model(-x)
    with rewinding.of(1):  # computing again need not
        pass


def test_a_whole_part_may_note_that_it_put_hooks() -> None:
    def hook_once(model: Any, x: Tensor) -> Tensor:
        if not hasattr(model, "_hooked"):
            model.layer.register_forward_hook(lambda *_: None)
            model._hooked = True
        return whole(model.layer(x))

    x = torch.ones(4, 3)
    model, left = _left(hook_once)
    rewinding = Rewinding([list(model.named_modules())], left)
    for _ in range(2):
        with rewinding.of(1, check=True):
            model(x)
    assert not hasattr(model, "_hooked")  # like the hooks, which are put back


class Straying(nn.Module):
    """Counts in the module around it."""

    def __init__(self, around: list[Any]) -> None:
        super().__init__()
        self.around = around

    def forward(self, x: Tensor) -> Tensor:
        self.around[0].count += 1
        return whole(x)


def test_whole_parts_change_only_their_own() -> None:
    model = Model(lambda model, x: model.inner(model.layer(x)))
    model.inner = Straying([model])
    with pytest.raises(CaptureError, match=r"as it is changes `count`, which is not its own"):
        capture(model, (torch.randn(4, 3),))
    assert model.count == 0


@pytest.mark.parametrize("end", [lambda result: result, whole], ids=["captured", "whole"])
def test_tensors_that_are_no_buffers_are_not_written_to(end: Callable[[Tensor], Tensor]) -> None:
    def directly(model: Any, x: Tensor) -> Tensor:
        model.mask.add_(1)
        return end(model.layer(x))

    def through_a_view(model: Any, x: Tensor) -> Tensor:
        model.masks["first"][0] += 1
        return end(model.layer(x))

    def its_own(model: Any, x: Tensor) -> Tensor:
        fresh = torch.ones(3)
        fresh[0] += 1
        return end(model.layer(x) * fresh * model.mask)

    for function, name in ((directly, "mask"), (through_a_view, "masks")):
        with pytest.raises(CaptureError, match=rf"writes into the tensor `.*{name}.*\n.*buffer"):
            capture(Model(function), (torch.randn(4, 3),))
    capture(Model(its_own), (torch.randn(4, 3),))


def test_parts_and_buffers_are_not_made_in_forward() -> None:
    def module(model: Any, x: Tensor) -> Tensor:
        model.other = nn.Linear(3, 3)
        return model.other(model.layer(x))

    def parameter(model: Any, x: Tensor) -> Tensor:
        model.layer.weight = nn.Parameter(torch.ones(3, 3))
        return model.layer(x)

    def buffer(model: Any, x: Tensor) -> Tensor:
        model.register_buffer("table", torch.ones(3))
        return model.layer(x) * model.table

    def reshaped(model: Any, x: Tensor) -> Tensor:
        model.layer.mean = torch.ones(3)
        return model.layer(x)

    refused = [
        (module, r"makes or replaces the submodule `other`.*\n.*__init__"),
        (parameter, r"makes or replaces the parameter `layer.weight`.*\n.*__init__"),
        (buffer, r"makes the buffer `table`.*\n.*__init__"),
        (reshaped, r"a tensor of shape \[3\] in the buffer `layer.mean`.*\[1\].*\n.*the shape"),
    ]
    for function, match in refused:
        model = Model(function)
        model.layer.register_buffer("mean", torch.ones(1))
        names = list(model.state_dict())
        with pytest.raises(CaptureError, match=match):
            capture(model, (torch.randn(4, 3),))
        assert list(model.state_dict()) == names

    def cached(model: Any, x: Tensor) -> Tensor:
        if not hasattr(model, "table"):
            model.register_buffer("table", torch.ones(3), persistent=False)
        return model.layer(x) * model.table

    model = Model(cached)
    assert capture(model, (torch.randn(4, 3),)).left == Left(absent=(("", "table"),))
    assert not hasattr(model, "table")


def _count_outside(model: Any, x: Tensor) -> Tensor:
    global CALLS
    CALLS += 1
    return model.layer(x)


def _log_outside(model: Any, x: Tensor) -> Tensor:
    LOGGED.append(x)
    return model.layer(x)


def _count_in_class(model: Any, x: Tensor) -> Tensor:
    type(model).calls += 1
    return model.layer(x)


OUTSIDE = [(_count_outside, "CALLS"), (_log_outside, "LOGGED"), (_count_in_class, "calls")]


@pytest.mark.parametrize(("function", "name"), OUTSIDE)
def test_what_is_outside_of_the_model_is_changed_once_for_each_call(
    function: Callable[[Any, Tensor], Tensor], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for holder, outside in ((globals(), "CALLS"), (globals(), "LOGGED")):
        monkeypatch.setitem(holder, outside, copy.copy(holder[outside]))
    monkeypatch.setattr(Model, "calls", 0)
    model = Model(function)
    captured = capture(model, (torch.randn(4, 3),))
    assert (CALLS, LOGGED, Model.calls) == (0, [], 0)
    for _ in range(2):
        captured.left.apply(model)
    found = {"CALLS": CALLS, "LOGGED": len(LOGGED), "calls": Model.calls}
    assert found == {"CALLS": 0, "LOGGED": 0, "calls": 0} | {name: 2}
    assert repr(capture(model, (torch.randn(4, 3),)).left) == repr(captured.left)
    for item in LOGGED:
        with pytest.raises(CaptureError, match=r"`LOGGED\[0\]` is what.*\n.*have forward return"):
            item.sum()


@pytest.mark.parametrize(("function", "name"), OUTSIDE)
def test_whole_parts_do_not_change_what_is_outside_of_the_model(
    function: Callable[[Any, Tensor], Tensor], name: str
) -> None:
    model = Model(lambda model, x: whole(function(model, x)))
    with pytest.raises(CaptureError, match=rf"changes `{name}`, which is no part.*\n.*attribute"):
        capture(model, (torch.randn(4, 3),))
    assert (CALLS, LOGGED, Model.calls) == (0, [], 0)


class Recorder:
    """A hook that keeps what it sees."""

    def __init__(self) -> None:
        self.count = 0
        self.last: Any = None
        self.seen: list[Any] = []
        self.by_name: dict[str, list[Any]] = defaultdict(list)
        self.sizes: set[int] = set()
        self.recent: deque[Any] = deque(maxlen=1)

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.count += 1
        self.last = output
        self.seen.append(output.detach().abs().mean().item())
        self.by_name["layer"].append(output)
        self.sizes.add(output.dim())
        self.recent.append(output.shape)

    def record(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self(module, args, output)


def _in_a_closure(recorder: Recorder) -> Callable[..., None]:
    return lambda module, args, output: recorder(module, args, output)


def _by_name(recorder: Recorder, module: nn.Module, args: Any, output: Tensor) -> None:
    recorder(module, args, output)


HOOKS: dict[str, Callable[[Recorder], Callable[..., None]]] = {
    "object": lambda recorder: recorder,
    "method": lambda recorder: recorder.record,
    "closure": _in_a_closure,
    "partial": lambda recorder: functools.partial(_by_name, recorder),
    "default": lambda recorder: lambda m, a, output, kept=recorder: kept(m, a, output),
}


@pytest.mark.parametrize("kind", [*HOOKS, "all modules"])
def test_what_hooks_keep_is_as_what_attributes_keep(kind: str) -> None:
    model, recorder = nn.Sequential(nn.Linear(3, 3), nn.Tanh()), Recorder()
    times = 3 if kind == "all modules" else 1
    handle = (
        torch.nn.modules.module.register_module_forward_hook(recorder)
        if kind == "all modules"
        else model[0].register_forward_hook(HOOKS[kind](recorder))
    )
    try:
        captured = capture(model, (torch.randn(4, 3),))
        assert not captured.runs_submodules
        assert vars(recorder) == vars(Recorder())
        for _ in range(2):
            captured.left.apply(model)
        again = capture(model, (torch.randn(4, 3),)).left
        assert again.counted == captured.left.counted
    finally:
        handle.remove()
    assert (recorder.count, len(recorder.seen), recorder.sizes) == (2 * times, 2 * times, {2})
    assert len(recorder.recent) == 1
    for kept in (recorder.last, recorder.seen[0], recorder.by_name["layer"], recorder.recent[0]):
        with pytest.raises(CaptureError, match=r"is what the model's forward left there"):
            kept + 1


def test_what_hooks_go_on_with_is_refused() -> None:
    for change in (
        lambda seen, output: output + len(seen.append(output) or seen),
        lambda seen, output: seen.insert(0, output),
        lambda seen, output: seen.append(output) or (seen.pop(0) if len(seen) > 3 else output),
    ):
        seen: list[Any] = [1]
        model = nn.Sequential(nn.Linear(3, 3))
        hook = functools.partial(lambda kept, _, m, a, output: change(kept, output), seen, 0)  # noqa: B023
        model[0].register_forward_hook(hook)
        with pytest.raises(CaptureError, match="goes on with what an earlier call left in `list`"):
            capture(model, (torch.randn(4, 3),))
        assert seen == [1]


TABLES: dict[int, Tensor] = {}


def test_caches_outside_of_the_model_stay_as_they_were() -> None:
    def cached(model: Any, x: Tensor) -> Tensor:
        if x.shape[1] not in TABLES:
            TABLES[x.shape[1]] = torch.arange(3.0)
        return model.layer(x) * TABLES[x.shape[1]]

    model, left = _left(cached)
    left.apply(model)
    assert left == Left()
    assert TABLES == {}


@pytest.mark.parametrize("end", [lambda result: result, whole], ids=["captured", "whole"])
def test_prints_are_told_of(
    end: Callable[[Tensor], Tensor],
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def printing(model: Any, x: Tensor) -> Tensor:
        print("printed", x.shape[1])
        return end(model.layer(x))

    with caplog.at_level(logging.WARNING, "pyrannc"):
        captured = capture(Model(printing), (torch.randn(4, 3),))
    assert "printed 3\n" in capsys.readouterr().out
    told = [message for message in caplog.messages if message.startswith("forward prints")]
    assert len(told) == 1 or captured.runs_submodules


def test_what_is_made_once_outside_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ONCE", None)

    def once(model: Any, x: Tensor) -> Tensor:
        global ONCE
        if ONCE is None:
            ONCE = 2.0
        return model.layer(x) * ONCE

    model = Model(once)
    capture(model, (torch.randn(4, 3),)).left.apply(model)
    assert ONCE == 2.0


CHANGES: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "private": (lambda m: setattr(m, "_factor", 2.0), lambda m: getattr(m, "_factor", 1.0)),
    "tuple": (lambda m: setattr(m, "count", (1, 2)), lambda m: len(str(m.count))),
    "list": (lambda m: m.history.append(1), lambda m: len(m.history)),
    "nested": (lambda m: m.layers[0].append(1), lambda m: len(m.layers[0])),
    "set": (lambda m: m.names.add("other"), lambda m: len(m.names)),
    "dictionary": (lambda m: m.notes.update(calls=7), lambda m: m.notes["calls"] + 1),
    "object": (lambda m: setattr(m.meter, "count", 7), lambda m: m.meter.count + 1),
    "namespace": (lambda m: setattr(m.settings, "factor", 7), lambda m: m.settings.factor),
    "tensor": (lambda m: setattr(m, "mask", torch.full((3,), 2.0)), lambda m: m.mask),
    "function": (lambda m: setattr(m, "count", torch.relu), lambda m: 2 if m.count else 1),
    "enumeration": (lambda m: setattr(m, "count", Way.BACK), lambda m: 1 + (m.count is Way.BACK)),
    "kind of number": (lambda m: setattr(m, "count", Level(3)), lambda m: 1 + m.count),
    "unwatched": (lambda m: setattr(m.sealed, "count", 3), lambda m: 1 + m.sealed.count),
    "global": (lambda m: globals().update(FACTOR=2.0), lambda m: FACTOR),
    "global of a function in a table": (
        lambda m: globals().update(FACTOR=2.0), lambda m: HANDLERS["factor"]()
    ),
    "other file": (lambda m: setattr(layouts, "FACTOR", 2.0), lambda m: layouts.FACTOR),
    "class": (lambda m: setattr(type(m), "calls", 2), lambda m: m.calls + 1),
}  # fmt: skip


@pytest.mark.parametrize("kind", CHANGES)
def test_another_value_of_what_is_read_is_another_form(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Model, "calls", 0)
    monkeypatch.setitem(globals(), "FACTOR", 1.0)
    monkeypatch.setattr(layouts, "FACTOR", 1.0, raising=False)
    change, read = CHANGES[kind]
    model = Model(lambda model, x: model.layer(x) * read(model))
    form = Form(model)
    form.digest()
    captured = capture(model, (torch.randn(4, 3),))
    form.settle(captured.left, captured.read)
    before = form.digest()
    assert form.digest() == before
    change(model)
    changed = form.digest()
    assert changed != before
    assert form.digest() == changed


def test_what_nobody_reads_of_an_object_is_no_other_form() -> None:
    model = Model(lambda model, x: model.layer(x) * (1 + model.meter.count))
    form = Form(model)
    captured = capture(model, (torch.randn(4, 3),))
    assert captured.read == {("", "meter", "count")}
    form.settle(captured.left, captured.read)
    before = form.digest()
    model.meter.last = object()
    assert form.digest() == before


@dataclasses.dataclass
class Settings:
    """One of the user's."""

    factor: float = 1.0


class Slotted:
    """Without a dictionary."""

    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0


def test_watched_objects_are_as_before() -> None:
    class Listener:
        def touched(self, watched: Any, name: str | None) -> None:
            heard.append((type(watched).__name__, name))

    listener = Listener()
    _watched.listen(listener)
    for thing, name in ((Meter(), "count"), (Settings(), "factor"), (Slotted(), "count")):
        heard: list[tuple[str, str | None]] = []
        kind = type(thing)
        assert _watched.can_be_watched(thing)
        assert _watched.watch(thing)
        assert isinstance(thing, kind)
        assert thing.__class__ is kind
        value = getattr(thing, name)
        setattr(thing, name, value + 1)
        assert heard[-2:] == [(kind.__name__, name), (kind.__name__, None)]
        assert type(copy.deepcopy(thing)) is kind
        assert type(pickle.loads(pickle.dumps(thing))) is kind
        _watched.unwatch(thing)
        assert type(thing) is kind
        assert getattr(thing, name) == value + 1
    _watched.ignore(listener)
    assert Meter.made == []
    assert not _watched.can_be_watched(nn.Linear(1, 1))


def test_objects_with_slots_are_put_back() -> None:
    model = Model(lambda model, x: x)
    model.count = Slotted()
    before = Snapshot(model.named_modules())
    model.count.count += 1
    assert before.restore().values == {("", "count", "count"): 1}
    assert model.count.count == 0
    before = Snapshot(model.named_modules())
    del model.count.count
    assert before.restore().values == {("", "count", "count"): GONE}
    assert model.count.count == 0
