"""Dropout switched on or off in a captured model, whatever mode its modules are in."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._flat import operator_of

if TYPE_CHECKING:
    from torch import fx

_DROPOUTS = {
    "aten.dropout", "aten.feature_dropout", "aten.alpha_dropout", "aten.feature_alpha_dropout",
}  # fmt: skip
_ATTENTION = "aten.scaled_dot_product_attention"


def set_dropout(module: fx.GraphModule, *, enabled: bool) -> None:
    """Gives every dropout operator of the flat graph this mode.

    Dropout inside of an attention operator can only be switched off: in evaluation the model gives
    it a probability of zero. Other random operators stay as they are.
    """
    for node in module.graph.nodes:
        what = operator_of(node)
        if what is None:
            continue
        if what.packet in _DROPOUTS:
            _set(node, 2, "train", enabled)
        elif what.packet == _ATTENTION and not enabled:
            _set(node, 4, "dropout_p", 0.0)


def _set(node: fx.Node, position: int, name: str, value: float) -> None:
    if position < len(node.args):
        node.update_arg(position, value)
    else:
        node.update_kwarg(name, value)
