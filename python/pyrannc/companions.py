"""Which replicas run the same microbatch, for stages whose replicas talk while they compute.

A synchronised batch norm waits, in the middle of a forward or backward, for all replicas that run
the same microbatch. That must not close a circle of ranks that wait for each other, which the check
of the program does not know of; so it is checked here, on what all ranks do in a step.
"""

from __future__ import annotations

import graphlib
from collections import defaultdict
from typing import TYPE_CHECKING

from ._flat import attribute
from .batch_norm import PartNorm
from .errors import PlanError

if TYPE_CHECKING:
    from collections.abc import Collection, Hashable

    from torch import fx

    from . import _core
    from .capture import Captured

_COMPUTING = ("forward", "backward")


def companions(
    program: _core.Program, world_size: int, talking: Collection[int]
) -> dict[tuple[int, int], list[int]]:
    """By stage and microbatch the ranks that run it, for the stages that are `talking`.

    Raises:
        PlanError: when their talk could make ranks wait for each other for ever.
    """
    actions = [[*program.forward(r), *program.backward(r)] for r in range(world_size)]
    found: dict[tuple[int, int], list[int]] = defaultdict(list)
    for rank, own in enumerate(actions):
        for action in own:
            if action.kind == "forward" and action.stage in talking:
                found[action.stage, action.microbatch].append(rank)
    together = {key: ranks for key, ranks in found.items() if len(ranks) > 1}
    _check(actions, together)
    return together


def synchronized_stages(captured: Captured, placement: _core.Placement) -> frozenset[int]:
    """The stages with several replicas that have synchronised batch norms."""
    norms = {key for key, node in captured.node_by_key.items() if _synchronizes(captured, node)}
    return frozenset(
        index
        for index, stage in enumerate(placement.stages)
        if len(stage.ranks) > 1 and not norms.isdisjoint(stage.nodes)
    )


def _synchronizes(captured: Captured, node: fx.Node) -> bool:
    if node.op != "call_module":
        return False
    called = attribute(captured.module, node)
    return isinstance(called, PartNorm) and called.synchronized


def _check(actions: list[list[_core.Action]], together: dict[tuple[int, int], list[int]]) -> None:
    order: graphlib.TopologicalSorter[Hashable] = graphlib.TopologicalSorter()
    sent: dict[tuple[int, int], list[Hashable]] = defaultdict(list)
    for rank, own in enumerate(actions):
        before: Hashable | None = None
        for index, action in enumerate(own):
            point = _point(rank, index, action, together)
            order.add(point, *([] if before is None else [before]))
            before = point
            if action.kind == "send":
                sent[rank, action.peer].append(point)
    for rank, own in enumerate(actions):
        heard: dict[int, int] = defaultdict(int)
        awaited: list[tuple[_core.Slot, Hashable]] = []
        for index, action in enumerate(own):
            point = _point(rank, index, action, together)
            if action.kind == "recv":
                awaited.append((action.slot, sent[action.peer, rank][heard[action.peer]]))
                heard[action.peer] += 1
                continue
            used = [entry for entry in awaited if _uses(action, entry[0])]
            order.add(point, *(sender for _, sender in used))
            awaited = [entry for entry in awaited if entry not in used]
    try:
        order.prepare()
    except graphlib.CycleError as error:
        raise PlanError(
            "the replicas of a stage with synchronised batch norm would wait for each other",
            hint="set `pipeline_num=1`, or use `nn.BatchNorm` in place of `nn.SyncBatchNorm`",
        ) from error


def _uses(action: _core.Action, slot: _core.Slot) -> bool:
    """Whether an action waits until the slot is complete: a receive by itself does not."""
    match action.kind:
        case "forward":
            return action.value_slot(slot.value) == slot
        case "backward":
            return action.gradient_slot(slot.value) == slot
        case "send" | "copy" | "reduce_output":
            return action.slot == slot
    return False


def _point(
    rank: int, index: int, action: _core.Action, together: dict[tuple[int, int], list[int]]
) -> Hashable:
    if action.kind in _COMPUTING and (action.stage, action.microbatch) in together:
        return (action.kind, action.stage, action.microbatch)
    return (rank, index)
