"""Times a part of a captured graph on random data."""

from __future__ import annotations

import contextlib
import logging
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from pyrannc._strides import ordered
from pyrannc.cluster import synchronize
from pyrannc.stage import build_stage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pyrannc.capture import Captured
    from pyrannc.stage import StageModule

logger = logging.getLogger(__name__)

_TINY_NS = 100_000
_TOO_LONG_NS = 3_000_000_000
_FEWEST_REPEATS = 3
_LAUNCHES = 4


@dataclass(frozen=True, slots=True)
class Times:
    """How long a part of the graph took."""

    forward_ns: int
    backward_ns: int

    def as_pair(self) -> tuple[int, int]:
        """Forward, then backward."""
        return self.forward_ns, self.backward_ns


@dataclass(frozen=True, slots=True)
class Enough:
    """A measurement ends after this time or so many repeats, whichever comes first."""

    time_ns: int
    repeats: int


ENOUGH = Enough(30_000_000, 9)
"""For one operator."""

ENOUGH_TO_CALIBRATE = Enough(1_000_000_000, 31)
"""For many operators at once, whose time all predictions rest on: cores run slower and faster for
seconds at a time."""


class Stopwatch:
    """Runs parts of one graph on one device.

    Args:
        captured: the model.
        description: its graph, parsed.
        device: where to run.
    """

    def __init__(
        self, captured: Captured, description: dict[str, Any], device: torch.device
    ) -> None:
        self._captured = captured
        self._values = description["values"]
        self._nodes = description["nodes"]
        self._outputs = set(description["outputs"])
        self._device = device
        self._readers: dict[int, list[str]] = {}
        for node in self._nodes:
            for value in node["inputs"]:
                self._readers.setdefault(value, []).append(node["key"])

    def measure(
        self, nodes: list[dict[str, Any]], rows: int, enough: Enough = ENOUGH
    ) -> Times | None:
        """The times of these operators together; none when they cannot run, as for lack of memory.

        Args:
            nodes: operators of the graph, in its order.
            rows: of the batch.
            enough: how long to go on.
        """
        try:
            inputs, outputs = self._border(nodes)
            stage = build_stage(self._captured, [node["key"] for node in nodes], inputs, outputs)
            with _on_device(stage, self._device):
                return self._repeat(_Work(self, stage, nodes, rows), enough)
        except torch.OutOfMemoryError:
            logger.info("no memory to measure %s with %d rows", nodes[0]["key"], rows)
        except Exception as error:
            # Random data does not suit every operator; an estimate is better than no training.
            logger.warning(
                "cannot measure %s with %d rows: %s: %s",
                nodes[0]["key"],
                rows,
                type(error).__name__,
                str(error).split("\n")[0],
            )
        return None

    def _border(self, nodes: list[dict[str, Any]]) -> tuple[list[int], list[int]]:
        """What the operators read from others, and what others read from them."""
        keys = {node["key"] for node in nodes}
        made = [value for node in nodes for value in node["outputs"]]
        read = dict.fromkeys(value for node in nodes for value in node["inputs"])
        inputs = [value for value in read if value not in made and not self._is_state(value)]
        alone = len(nodes) == 1
        outputs = [
            value
            for value in made
            if alone
            or value in self._outputs
            or any(reader not in keys for reader in self._readers.get(value, []))
        ]
        return inputs, outputs or made[-1:]

    def _is_state(self, value: int) -> bool:
        return self._values[value]["kind"] in ("parameter", "buffer", "constant")

    def random(self, value: int, rows: int) -> torch.Tensor:
        """A tensor such as this value: normal numbers, zeros or false; a leaf."""
        description = self._values[value]
        shape = [
            size if isinstance(size, int) else max(size[0] * rows + size[1], 0)
            for size in description["shape"]
        ]
        dtype: torch.dtype = getattr(torch, description["dtype"])
        order = self._captured.orders[value]
        if not dtype.is_floating_point and not dtype.is_complex:
            return torch.empty_permuted(shape, order, dtype=dtype, device=self._device).zero_()
        made = ordered(torch.randn(shape, device=self._device).to(dtype), order)
        return made.requires_grad_(description["requires_grad"])

    def _repeat(self, work: _Work, enough: Enough) -> Times:
        """The median of several runs after one that warms up; the least for what is tiny."""
        launches = 1 if self._device.type == "cpu" else _LAUNCHES
        first = work.run(self._device, 1)
        forwards: list[int] = []
        backwards: list[int] = []
        spent = 0
        while len(forwards) < _FEWEST_REPEATS or (
            spent < enough.time_ns and len(forwards) < enough.repeats
        ):
            times = work.run(self._device, launches if sum(first.as_pair()) < 10 * _TINY_NS else 1)
            forwards.append(times.forward_ns)
            backwards.append(times.backward_ns)
            spent += sum(times.as_pair())
            if spent > _TOO_LONG_NS:
                break
        return Times(_typical(forwards), _typical(backwards))


def _clock(device: torch.device) -> Callable[[], int]:
    """What to time with: on one thread of a CPU the time it ran, whatever else wants the core."""
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    return time.thread_time_ns if alone else time.perf_counter_ns


def _typical(times: list[int]) -> int:
    middle = int(statistics.median(times))
    return min(times) if middle < _TINY_NS else middle


class _Work:
    """One part of the graph with its data."""

    def __init__(
        self, stopwatch: Stopwatch, stage: StageModule, nodes: list[dict[str, Any]], rows: int
    ) -> None:
        self._stage = stage
        self._rows = rows
        self._leaves = {value: stopwatch.random(value, rows) for value in stage.inputs}
        self._written = {value for node in nodes for value in node.get("mutates", [])}
        state = [p for p in stage.parameters.values() if p.requires_grad]
        leaves = [leaf for leaf in self._leaves.values() if leaf.requires_grad]
        self._targets = [*leaves, *state]
        device = stopwatch._device
        count = len(stopwatch._captured.denominators)
        self._denominators = [torch.ones((), device=device) for _ in range(count)]
        self._numbers = stopwatch._captured.named_numbers(stopwatch._captured.numbers)

    def run(self, device: torch.device, launches: int) -> Times:
        """The time of one run, as the mean of several that are launched together."""
        arguments = [self._arguments() for _ in range(launches)]
        now = _clock(device)
        synchronize(device)
        start = now()
        known = (self._rows, 1.0, self._denominators, None, self._numbers)
        results = [self._stage(values, *known) for values in arguments]
        synchronize(device)
        forward_ns = (now() - start) // launches
        work = [_differentiated(result) for result in results]
        del results
        if not self._targets or not work[0][0]:
            return Times(forward_ns, 0)
        synchronize(device)
        start = now()
        for roots, seeds in work:
            torch.autograd.grad(roots, self._targets, seeds, allow_unused=True)
        synchronize(device)
        return Times(forward_ns, (now() - start) // launches)

    def _arguments(self) -> dict[int, torch.Tensor]:
        """The inputs; copies of those that are written to, as no leaf may be."""
        return {
            value: leaf.clone() if value in self._written else leaf
            for value, leaf in self._leaves.items()
        }


def _differentiated(
    outputs: dict[int, torch.Tensor],
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The outputs that have gradients, and a gradient for each."""
    roots = [output for output in outputs.values() if output.requires_grad]
    return roots, [torch.ones_like(root) for root in roots]


@contextlib.contextmanager
def _on_device(stage: StageModule, device: torch.device) -> Iterator[None]:
    """Lends the stage its parameters on the device, and buffers that it may spoil."""
    kept = {name: p.data for name, p in stage.parameters.items()}
    spoiled = {name: b.data for name, b in stage.buffers.items()}
    try:
        for name, parameter in stage.parameters.items():
            parameter.data = kept[name].to(device)
        for name, buffer in stage.buffers.items():
            buffer.data = spoiled[name].to(device, copy=True)
        yield
    finally:
        for name, parameter in stage.parameters.items():
            parameter.data = kept[name]
        for name, buffer in stage.buffers.items():
            buffer.data = spoiled[name]
