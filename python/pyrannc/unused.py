"""Parameters and arguments that a model's forward does not use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .errors import RaNNCError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from . import _core
    from .capture import Captured

_SHOWN = 5


def refuse_unused(captured: Captured, graph: _core.Graph, parameters: Iterable[str]) -> None:
    """Makes sure that a captured model uses all that it has and is given.

    Args:
        captured: the model as it trains.
        graph: the same for the planner.
        parameters: names of the model's parameters.

    Raises:
        RaNNCError: when it does not, with the names.
    """
    unused = [name for name in parameters if name not in captured.state]
    left = [v for v in graph.inputs if not captured.value_nodes[v].users]
    kinds = (("parameters", unused), ("arguments", [captured.value_names[v] for v in left]))
    told = [f"the {kind} {_listed(names)}" for kind, names in kinds if names]
    if told:
        raise RaNNCError(
            f"the model's forward does not use {' and '.join(told)}",
            hint="remove them from the model or from its call, or leave out "
            "`check_unused_values=True`: then such parameters stay as they are, as without RaNNC, "
            "and state_dict() has them",
        )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(f"`{name}`" for name in names[:_SHOWN]) + more
