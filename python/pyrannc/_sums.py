"""Operators whose arguments include sums over the rows of the batch.

Linear operators keep a sum a sum. A sum that can be computed from the model's inputs alone, a count
of unmasked tokens say, may also be known before the step: then it is a *denominator*, the same for
every part of the batch, and may be used in any way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import fx

from ._flat import written_arguments
from ._layout import NONE, SUM, Layout, MixesRows
from ._losses import Rewrite
from ._row_rules import layouts_of, scales_with_rows
from ._sizes import depends_on_rows

if TYPE_CHECKING:
    from ._rows import Call

_LINEAR = {
    "aten.neg", "aten.negative", "aten.clone", "aten.contiguous", "aten.detach", "aten.alias",
    "aten.to", "aten._to_copy", "aten.view", "aten.reshape", "aten.flatten", "aten.unflatten",
    "aten.squeeze", "aten.unsqueeze", "aten.expand", "aten.permute", "aten.transpose", "aten.t",
    "aten.sum", "aten.mean", "aten.select", "aten.slice", "aten.narrow", "aten.unbind",
    "aten.split", "aten.chunk", "aten.split_with_sizes", "aten.positive", "aten.flip",
    "aten.repeat", "aten.cumsum", "aten.real", "aten.lift_fresh_copy",
}  # fmt: skip
_OF_SIZES = {"aten.ones_like", "aten.zeros_like", "aten.full_like"}
_ADDITIONS = {"aten.add", "aten.sub", "aten.subtract", "aten.rsub"}
_PRODUCTS = {"aten.mul", "aten.multiply"}
_QUOTIENTS = {"aten.div", "aten.divide", "aten.true_divide"}
_JOINTS = {"aten.stack", "aten.cat", "aten.concat", "aten.concatenate"}


def layout_with_sums(call: Call) -> list[Layout]:
    """The layouts of an operator's results when some arguments are sums over rows.

    Raises:
        MixesRows: when it is not linear in a sum that only the whole batch tells.
    """
    try:
        return _linear(call)
    except MixesRows:
        sums = [tensor for tensor in call.tensors if call.layout(tensor) is SUM]
        known = [t for t in sums if call.promotable(t) and not call.shape(t)]
        if not known or written_arguments(call.node):
            raise
        call.rewrites.clear()
        # A quotient needs its divisor only; a product needs all but one factor.
        for tensor in reversed(known):
            call.promoted.add(tensor)
            call.rewrites.append(Rewrite("promote", call.node, operand=tensor))
            try:
                return _after_promotion(call)
            except MixesRows:
                if tensor is known[0]:
                    raise
        raise


def _after_promotion(call: Call) -> list[Layout]:
    kept = list(call.rewrites)
    try:
        if any(call.layout(tensor) is SUM for tensor in call.tensors):
            return _linear(call)
        return layouts_of(call)
    except MixesRows:
        call.rewrites[:] = kept
        raise


def _linear(call: Call) -> list[Layout]:
    packet = call.operator.packet
    if packet in _LINEAR and not call.numbers_of_rows and not _rounds(call):
        return [SUM for _ in call.outputs]
    if packet in _OF_SIZES:
        return [NONE]
    if packet in _ADDITIONS:
        return _sum_of_sums(call)
    if packet in _PRODUCTS or packet in _QUOTIENTS:
        return _scaled_sum(call)
    if packet in _JOINTS:
        for tensor in call["tensors"]:
            _as_sum(call, tensor)
        return [SUM]
    raise MixesRows("is not linear in a sum over the batch")


def _rounds(call: Call) -> bool:
    dtypes = [node.meta["val"].dtype for node in (*call.tensors[:1], *call.outputs[:1])]
    return dtypes[0].is_floating_point and not dtypes[-1].is_floating_point


def _as_sum(call: Call, tensor: Any) -> None:
    """Makes an argument one that adds up over the parts of the batch."""
    layout = call.layout(tensor)
    if layout is SUM:
        return
    if layout is not NONE:
        raise MixesRows("adds a sum over the batch to each row")
    call.rewrites.append(Rewrite("share_operand", call.node, operand=tensor))


def _sum_of_sums(call: Call) -> list[Layout]:
    if depends_on_rows(call["alpha"]):
        raise MixesRows("computes with the number of rows")
    for operand in (call["self"], call["other"]):
        if isinstance(operand, fx.Node):
            _as_sum(call, operand)
        elif depends_on_rows(operand):
            raise MixesRows("computes with the number of rows")
        elif operand != 0:
            if not call.outputs[0].meta["val"].is_floating_point():
                raise MixesRows("adds a number to a whole-numbered sum over the batch")
            if written_arguments(call.node):
                raise MixesRows("adds a number to a sum over the batch in place")
            call.rewrites.append(Rewrite("share_number", call.node))
    return [SUM]


def _scaled_sum(call: Call) -> list[Layout]:
    first, second = call.layout(call["self"]), call.layout(call["other"])
    if call["rounding_mode"] is not None:
        raise MixesRows("is not linear in a sum over the batch")
    if {first, second} != {SUM, NONE} or (second is SUM and call.operator.packet in _QUOTIENTS):
        raise MixesRows("is not linear in a sum over the batch")
    if call.numbers_of_rows and not scales_with_rows(call):
        raise MixesRows("computes with the number of rows")
    return [SUM]


def promoted_operands(rewrites: list[Rewrite]) -> list[fx.Node]:
    """The sums to be computed before the step, each once, in order."""
    found: list[fx.Node] = []
    for rewrite in rewrites:
        if rewrite.kind == "promote" and rewrite.operand not in found:
            assert rewrite.operand is not None
            found.append(rewrite.operand)
    return found
