"""Values whose reduction over the batch the user states, because the analysis cannot tell.

Each part of the batch computes such a value as the bare model would from that part alone, and the
parts' values are added up: as they are, or each times its share of the rows. So all that lies
between values that have rows and the stated one becomes a single operator, whose result is a sum.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ._cut import cut
from ._flat import Operator, drop_unread, is_value, operator_of, outputs_of, written_arguments
from ._layout import Split
from ._sizes import depends_on_rows
from .errors import RaNNCError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import fx

    from ._rows import RowAnalysis
    from ._sizes import Symbols

REDUCTIONS = ("mean", "sum")


class Stated(torch.nn.Module):
    """Computes a value of a part of the batch, and what that counts in the value of all."""

    def __init__(self, inner: fx.GraphModule, extras: list[str], reduction: str, name: str) -> None:
        super().__init__()
        self.inner = inner
        self._extras = extras
        self._is_mean = reduction == "mean"
        self.__name__ = f"{reduction}.{name}"

    def forward(
        self, *args: torch.Tensor, rows: int, row_share: float, **numbers: float
    ) -> torch.Tensor:
        """Runs the operators; what is stated inside of them counts for this part alone."""
        known = {**numbers, "rows": rows, "row_share": 1.0}
        (result,) = self.inner(*args, *(known[name] for name in self._extras))
        value: torch.Tensor = result * row_share if self._is_mean else result
        return value


def state(
    module: fx.GraphModule,
    analysis: RowAnalysis,
    symbols: Symbols,
    reductions: Mapping[int, str],
) -> bool:
    """Takes the reductions of outputs as stated where the first operator that mixes rows ends up.

    Args:
        module: the flat graph, which is changed.
        analysis: of this graph.
        symbols: translates symbolic sizes.
        reductions: `mean` or `sum` by the position of an output.

    Returns:
        Whether anything was changed: the operator leads to stated outputs only, by way of values
        without rows.
    """
    culprit = analysis.culprits[0]
    roots = _roots(culprit, symbols)
    tainted = set().union(*(_following([node]) for node in analysis.culprits))
    changes = []
    for root in roots or ():
        reduction = _reduction(root, reductions)
        members = _members(root, tainted, analysis)
        if reduction is None or not all(_can_be_inside(node) for node in members):
            return False
        changes.append((root, members, reduction))
    for root, members, reduction in changes:
        _replace(module, root, members, reduction)
    drop_unread(module.graph)
    return bool(changes)


def _roots(culprit: fx.Node, symbols: Symbols) -> list[fx.Node] | None:
    """The first values after an operator that have no rows; `None` if one with rows is returned."""
    found: dict[fx.Node, None] = {}
    waiting = outputs_of(culprit)
    seen: set[fx.Node] = set()
    while waiting:
        value = waiting.pop()
        if value in seen:
            continue
        seen.add(value)
        if not any(depends_on_rows(length) for length in symbols.shape(value.meta["val"])):
            if not value.meta["val"].dtype.is_floating_point:
                return None
            found[value] = None
            continue
        for user in value.users:
            if user.op == "output":
                return None
            waiting += outputs_of(user)
    return list(found)


def _following(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += node.users
    return found


def _reduction(root: fx.Node, reductions: Mapping[int, str]) -> str | None:
    """What is stated of the outputs that a value leads to.

    It holds for others of them, too: a loss with a balance of experts in it, of which the user
    states but the balance.
    """
    following = _following([root])
    results = root.graph.output_node().args[0]
    assert isinstance(results, (tuple, list))
    reached = [i for i, result in enumerate(results) if result in following]
    stated = {reductions[i] for i in reached if i in reductions}
    return stated.pop() if len(stated) == 1 else None


def _members(root: fx.Node, tainted: set[fx.Node], analysis: RowAnalysis) -> set[fx.Node]:
    """What computes a value from values that have rows, or do not depend on the batch."""
    depends: dict[fx.Node, bool] = {}
    for node in root.graph.nodes:
        given = isinstance(analysis.layouts.get(node), Split) and node.op == "placeholder"
        depends[node] = given or any(depends[item] for item in node.all_input_nodes)
    members: set[fx.Node] = set()
    waiting = [root]
    while waiting:
        node = waiting.pop()
        has_rows = isinstance(analysis.layouts.get(node), Split) and node not in tainted
        if node in members or not depends[node] or has_rows:
            continue
        members.add(node)
        waiting += node.all_input_nodes
    return members


def _can_be_inside(node: fx.Node) -> bool:
    what = operator_of(node)
    if written_arguments(node) or node.op == "placeholder":
        return False
    if what is None or not isinstance(what.target, torch._ops.OpOverload):
        return True
    return torch.Tag.nondeterministic_seeded not in what.target.tags


def _replace(module: fx.GraphModule, root: fx.Node, members: set[fx.Node], reduction: str) -> None:
    """Has one operator compute a value."""
    graph = module.graph
    read = dict.fromkeys(
        item for node in graph.nodes if node in members for item in node.all_input_nodes
    )
    inputs = [node for node in read if node not in members and is_value(node)]
    part = cut(module, inputs, [root], name="Stated")
    origin = root if operator_of(root) is not None else root.all_input_nodes[0]
    what = operator_of(origin)
    assert what is not None
    stated = Stated(part.module, part.extras, reduction, what.name)
    number = sum(1 for _, child in module.named_children() if isinstance(child, Stated))
    module.add_submodule(f"_stated_{number}", stated)
    extras: dict[str, Any] = {
        name: next(node for node in graph.nodes if node.name == name)
        for name in dict.fromkeys(("rows", "row_share", *part.extras))
    }
    with graph.inserting_after(root):
        new = graph.call_module(f"_stated_{number}", tuple(inputs), extras)
    new.meta["val"] = root.meta["val"]
    new.meta["operator"] = Operator(stated, what.module)
    root.replace_all_uses_with(new)


def check_stated(
    reductions: Mapping[str, str] | str | None, names: Iterable[str], by_rows: Iterable[bool]
) -> None:
    """Makes sure that what is stated is stated of results that the model reduces over the batch.

    Args:
        reductions: what is stated, by the paths of results or of all.
        names: the paths of the model's results.
        by_rows: for each of them, whether it has rows.

    Raises:
        RaNNCError: when it is not.
    """
    if reductions is None or isinstance(reductions, str):
        return
    known = dict(zip(names, by_rows, strict=True))
    for name in reductions:
        if known.get(name, True):
            found = "has rows" if name in known else "is none of the model's results"
            listed = ", ".join(f"`{known_name}`" for known_name in known)
            raise RaNNCError(
                f"`output_reduction` is given for `{name}`, which {found}; they are {listed}",
                hint="give it for results that are reduced over the batch, by their keys, fields "
                "or positions, or one word for all of these",
            )


def reductions_of(given: Mapping[str | int, str] | str | None) -> dict[str, str] | str | None:
    """What is stated, by paths.

    Raises:
        RaNNCError: when a reduction is unknown.
    """
    words = [] if given is None else [given] if isinstance(given, str) else list(given.values())
    unknown = [word for word in words if word not in REDUCTIONS]
    if unknown:
        raise RaNNCError(f'`output_reduction` has {unknown[0]!r}, needed "mean" or "sum"')
    if given is None or isinstance(given, str):
        return given
    return {str(name): reduction for name, reduction in given.items()}
