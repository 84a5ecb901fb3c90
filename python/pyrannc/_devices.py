"""Moves captured operators to another device.

A captured operator that makes a tensor names the device that the model had during capture, and the
stages may run elsewhere.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx.node import map_aggregate

from ._flat import attribute, is_value, state_name
from ._stated import Stated


def move_operators(module: fx.GraphModule, device: torch.device, names: list[str]) -> None:
    """Has all operators of a module make their tensors on `device`.

    Args:
        module: the operators.
        device: where they are going to run.
        names: tensors of the module that belong to nobody else, which move too.
    """

    def moved(argument: Any) -> Any:
        return device if isinstance(argument, torch.device) else argument

    for node in module.graph.nodes:
        if node.op in ("call_function", "call_module"):
            node.args = map_aggregate(node.args, moved)
            node.kwargs = map_aggregate(dict(node.kwargs), moved)
    for child in module.children():
        if isinstance(child, Stated):
            move_operators(child.inner, device, [])
    for node in module.graph.find_nodes(op="get_attr"):
        if is_value(node) and state_name(node) in names:
            setattr(module, str(node.target), attribute(module, node).to(device))
    module.recompile()
