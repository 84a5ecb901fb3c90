"""Random numbers: from the user's seed, other ones for each part of the batch, and no others gone.

One process with one generator draws for the whole batch. Here every stage, microbatch and replica
draws for its own rows, so each of them gets a stream of its own, derived from the state of rank
0's default generator at the call. All ranks may be seeded alike and still draw different numbers;
the same seed gives the same run; a generator's state saved with a checkpoint goes on as it would
have. A draw that no rows depend on, such as noise for the whole batch, is the same one everywhere.
What the user draws for itself is the same as beside the bare model, but for one number that
each call takes when the model draws: so its next call finds another state. Parts of a model that
draw from Python's `random` or from NumPy do so from the same streams.
"""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from . import _host_random
from ._flat import attribute, operator_of
from ._opaque import Opaque

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from torch import fx

_SEED_BYTES = 7  # of what travels between ranks: fits a signed 64-bit number
_KNOWN_NAMESPACES = ("aten", "prims")
_SWITCHES = {"train": False, "training": False, "p": 0, "dropout_p": 0, "dropout": 0}
"""Arguments with these values make a random operator draw nothing."""


def seed_now() -> int:
    """A number that tells the state of the default generator, without drawing from it."""
    state = torch.default_generator.get_state()
    return _number(state.numpy().tobytes())


def advance() -> None:
    """Draws one number, so that the next :func:`seed_now` is another."""
    torch.empty((), dtype=torch.int64).random_()


@dataclass(frozen=True, slots=True)
class Streams:
    """One rank's streams for one captured model.

    Attributes:
        device: where it computes.
        replicas: for each stage that this rank holds, which of its replicas this is.
        needed: whether the model draws at all.
    """

    device: torch.device
    replicas: Mapping[int, int]
    needed: bool

    @contextlib.contextmanager
    def of(self, seed: int, stage: int, microbatch: int) -> Iterator[None]:
        """Has the body draw what this replica draws for a microbatch of the step with ``seed``."""
        if not self.needed:
            yield
            return
        _steps.append((seed, self.device))
        try:
            with _seeded(self.device, f"{seed} {stage} {microbatch} {self.replicas[stage]}"):
                yield
        finally:
            _steps.pop()


_steps: list[tuple[int, torch.device]] = []
"""Seed and device of the step that is running; backward may run in another thread."""


class SharedDraw(torch.nn.Module):
    """An operator that draws the same for all rows, whoever computes them."""

    def __init__(self, inner: Callable[..., Any], key: str) -> None:
        super().__init__()
        self.inner = inner
        self.key = key

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Draws; outside of a step as the operator does."""
        if not _steps:
            return self.inner(*args, **kwargs)
        seed, device = _steps[-1]
        with _seeded(device, f"{seed} {self.key}"):
            return self.inner(*args, **kwargs)


def share(module: fx.GraphModule, nodes: Mapping[str, fx.Node]) -> None:
    """Makes these operators of a flat graph, by their keys, draw the same for all rows."""
    for index, (key, node) in enumerate(nodes.items()):
        target: Any = node.target
        if node.op == "call_module":
            target = attribute(module, node)
        name = f"_shared_draw_{index}"
        module.add_submodule(name, SharedDraw(target, key))
        node.op, node.target = "call_module", name
    if nodes:
        module.recompile()


@contextlib.contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Has the body leave PyTorch's, Python's and NumPy's generators as they are."""
    with _forked(device):
        yield


def draws(nodes: Iterable[fx.Node]) -> bool:
    """Whether one of these operators of a flat graph draws random numbers, as far as can be told.

    Operators from outside of PyTorch, and parts that could not be captured, may.
    """
    return any(_draws(node) for node in nodes)


def _draws(node: fx.Node) -> bool:
    what = operator_of(node)
    if what is None:
        return False
    if isinstance(what.target, Opaque):
        return True
    if not isinstance(what.target, torch._ops.OpOverload):
        return False
    if torch.Tag.nondeterministic_seeded not in what.target.tags:
        return what.target.namespace not in _KNOWN_NAMESPACES
    given = dict(node.kwargs)
    given.update(zip((a.name for a in what.target._schema.arguments), node.args, strict=False))
    for argument in what.target._schema.arguments:
        if argument.name not in _SWITCHES:
            continue
        value = given.get(argument.name, argument.default_value)
        if isinstance(value, (bool, int, float)) and value == _SWITCHES[argument.name]:
            return False
    return True


@contextlib.contextmanager
def _seeded(device: torch.device, place: str) -> Iterator[None]:
    """Has the body draw what belongs to a place."""
    own = _number(place.encode())
    with _forked(device) as generators:
        for generator in generators:
            generator.manual_seed(own)
        _host_random.seed(own)
        yield


@contextlib.contextmanager
def _forked(device: torch.device) -> Iterator[list[torch.Generator]]:
    """PyTorch's generators of this process, which are afterwards as they were, like all others."""
    generators = [torch.default_generator]
    if device.type != "cpu":
        generators.append(torch.get_device_module(device).default_generators[device.index or 0])
    states = [generator.get_state() for generator in generators]
    with _host_random.kept():
        try:
            yield generators
        finally:
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)


def _number(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=_SEED_BYTES).digest(), "big")
