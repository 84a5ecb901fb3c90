"""Loss functions, and the rewriting that makes every reduction over the batch a plain sum.

The batch is computed in parts. A mean over rows becomes the mean of the part times the part's share
of the batch. A mean over counted targets (`cross_entropy` with `ignore_index` or class weights)
becomes the part's sum divided by a *denominator*: the count in the whole batch, which every
process computes from its inputs before the step and all add up.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ._cut import Part, cut
from ._flat import Operator, Scope, Scoped, drop_unread, is_value, operator_of, positional
from ._layout import NONE, SUM, Layout, MixesRows, Split, merge, placed

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from ._rows import Call

aten = torch.ops.aten

_ELEMENTWISE_LOSSES = {
    "aten.mse_loss", "aten.l1_loss", "aten.smooth_l1_loss", "aten.huber_loss",
    "aten.binary_cross_entropy", "aten.binary_cross_entropy_with_logits", "aten.kl_div",
    "aten.soft_margin_loss", "aten.poisson_nll_loss", "aten.margin_ranking_loss",
    "aten.hinge_embedding_loss",
}  # fmt: skip
_SAMPLE_LOSSES = {
    "aten.multi_margin_loss", "aten.multilabel_margin_loss", "aten.cosine_embedding_loss",
    "aten.triplet_margin_loss",
}  # fmt: skip
_COUNTED_LOSSES = {
    "aten.cross_entropy_loss", "aten.nll_loss", "aten.nll_loss_nd", "aten.nll_loss2d",
}  # fmt: skip
LOSSES = _ELEMENTWISE_LOSSES | _SAMPLE_LOSSES | _COUNTED_LOSSES

_NO_REDUCTION, _MEAN, _SUM = 0, 1, 2


@dataclass(frozen=True, slots=True)
class Rewrite:
    """One change of the flat graph.

    Attributes:
        kind: `share` (multiply the result by the share of the batch to the `power`),
            `share_operand` (multiply an argument by it), `share_number` (multiply the added
            number by it), `count` (divide a summed loss by its counted targets), `promote` (know
            an argument before the step).
        node: the operator to change.
        power: 1 or -1.
        operand: the argument.
    """

    kind: str
    node: fx.Node
    power: int = 1
    operand: fx.Node | None = None


class Shared(torch.nn.Module):
    """An operator whose result is multiplied by the share of the batch to some power."""

    def __init__(self, target: Callable[..., Any], scope: Scope | None, power: int) -> None:
        super().__init__()
        self._scoped = Scoped(target, scope or Scope())
        self._power = power

    def forward(self, *args: Any, row_share: float, **kwargs: Any) -> Any:
        """Calls the operator."""
        return self._scoped(*args, **kwargs) * row_share**self._power


class Denominator:
    """A number that the whole batch's inputs determine, as a sum over the processes' parts.

    Attributes:
        module: computes from the inputs what is counted or summed.
    """

    def __init__(
        self, part: Part, finish: Callable[..., torch.Tensor], batch_input: int, batch_dim: int
    ) -> None:
        self.module = part.module
        self._extras = part.extras
        self._finish = finish
        self._batch_input = batch_input
        self._batch_dim = batch_dim

    @torch.no_grad()
    def __call__(
        self, tensors: Sequence[torch.Tensor], numbers: Mapping[str, float] | None = None
    ) -> torch.Tensor:
        """This process's part, of its tensor arguments in the graph's order and of numbers."""
        rows = tensors[self._batch_input].shape[self._batch_dim]
        known = {**(numbers or {}), "rows": rows}
        return self._finish(rows, *self.module(*tensors, *(known[name] for name in self._extras)))


@dataclass(frozen=True, slots=True)
class _CountTargets:
    """Counts, or weighs, the targets that a loss averages over."""

    ignore_index: int
    dtype: torch.dtype

    def __call__(
        self, rows: int, target: torch.Tensor, weight: torch.Tensor | None = None
    ) -> torch.Tensor:
        del rows
        counted = target != self.ignore_index
        if weight is None:
            return counted.sum().to(self.dtype)
        weights = weight.to(self.dtype)[target.masked_fill(~counted, 0)]
        return weights.masked_fill(~counted, 0).sum()


def _as_it_is(rows: int, value: torch.Tensor) -> torch.Tensor:
    del rows
    return value


def _times_rows(rows: int, value: torch.Tensor) -> torch.Tensor:
    return value * rows


def loss_layout(call: Call) -> list[Layout]:
    """The layout of a loss function's result.

    Raises:
        MixesRows: when it computes across rows otherwise than by its reduction.
    """
    packet = call.operator.packet
    aligned = _aligned_elements if packet in _ELEMENTWISE_LOSSES else _aligned_samples
    source = aligned(call)
    if call["reduction"] == _NO_REDUCTION:
        return [placed(call.shape(output), source) for output in call.outputs]
    if call["reduction"] == _SUM:
        return [SUM]
    target = call["target"]
    if packet not in _COUNTED_LOSSES or target.meta["val"].is_floating_point():
        call.rewrites.append(Rewrite("share", call.node))
        return [SUM]
    for tensor in (target, call["weight"]):
        if isinstance(tensor, fx.Node) and not call.promotable(tensor):
            raise MixesRows("averages over targets that the model computes")
    call.rewrites.append(Rewrite("count", call.node))
    return [SUM]


def _aligned_elements(call: Call) -> Split:
    ndim = max(len(call.shape(tensor)) for tensor in call.tensors)
    found: Split | None = None
    for tensor in call.tensors:
        layout = call.layout(tensor)
        if isinstance(layout, Split):
            found = merge(found, layout.at(layout.dim + ndim - len(call.shape(tensor))))
    assert found is not None
    return found


def _aligned_samples(call: Call) -> Split:
    """Rows lie in the first dimension, or both in the same one of the trailing dimensions."""
    found: Split | None = None
    for tensor in call.tensors:
        layout = call.layout(tensor)
        if layout is NONE and tensor is call["weight"]:
            continue
        if not isinstance(layout, Split) or tensor is call["weight"]:
            raise MixesRows("compares rows with a tensor of fixed size")
        dim = layout.dim
        counted = call.operator.packet in _COUNTED_LOSSES
        if (
            counted
            and tensor is call["target"]
            and dim
            and len(call.shape(tensor)) < len(call.shape(call["self"]))
        ):
            dim += 1
        if dim == 1 or (dim and not counted):
            raise MixesRows("works along the dimension of the batch")
        found = merge(found, layout.at(dim))
    assert found is not None
    return found


class Rewriter:
    """Applies rewrites to the flat graph.

    Attributes:
        denominators: what must be computed before each step.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        inputs: list[fx.Node],
        layouts: dict[fx.Node, Layout],
    ) -> None:
        self.denominators: list[Denominator] = []
        self._module = module
        self._graph = module.graph
        self._inputs = inputs
        self._layouts = layouts
        self._row_share = next(n for n in self._graph.nodes if n.name == "row_share")
        self._promoted: dict[fx.Node, fx.Node] = {}
        self._num_shared = 0

    def apply(self, rewrites: list[Rewrite]) -> None:
        """Makes all changes; those before the step are cut out of the graph first."""
        for rewrite in rewrites:
            if rewrite.kind == "promote" and rewrite.operand not in self._promoted:
                assert rewrite.operand is not None
                means = {other.node for other in rewrites if other.kind == "share"}
                self._promote(rewrite.operand, is_mean=rewrite.operand in means)
        for rewrite in rewrites:
            if rewrite.kind == "share":
                self._share(rewrite.node, rewrite.power)
            elif rewrite.kind == "share_operand":
                assert rewrite.operand is not None
                self._share_operand(rewrite.node, rewrite.operand)
            elif rewrite.kind == "share_number":
                self._share_number(rewrite.node)
            elif rewrite.kind == "count":
                self._count(rewrite.node)
            else:
                assert rewrite.operand is not None
                promoted = self._promoted[rewrite.operand]
                rewrite.node.replace_input_with(rewrite.operand, promoted)
        drop_unread(self._graph)

    def _promote(self, operand: fx.Node, *, is_mean: bool) -> None:
        """Makes a denominator of a sum over the batch, or of a mean.

        A mean over the batch is the sum of the means of its parts, each times its rows, divided by
        all rows.
        """
        example = operand.meta["val"]
        if not is_mean:
            self._promoted[operand] = self._denominator([operand], _as_it_is, example)
            return
        total = self._denominator([operand], _times_rows, example)
        rows = next(node for node in self._graph.nodes if node.name == "rows")
        with self._graph.inserting_after(operand):
            share = self._graph.call_function(operator.truediv, (self._row_share, rows))
        with self._graph.inserting_after(share):
            mean = self._new(operand, aten.mul.Tensor, (total, share))
        mean.meta["val"] = example
        self._layouts[mean] = NONE
        self._promoted[operand] = mean

    def _share(self, node: fx.Node, power: int) -> None:
        """Puts the operator and the factor into one, as what lies between would be no sum."""
        what = operator_of(node)
        assert what is not None
        self._num_shared += 1
        attribute = f"_shared_{self._num_shared}"
        self._module.add_submodule(attribute, Shared(what.target, what.scope, power))
        node.op, node.target = "call_module", attribute
        node.kwargs = {**node.kwargs, "row_share": self._row_share}

    def _share_operand(self, node: fx.Node, operand: fx.Node) -> None:
        with self._graph.inserting_before(node):
            scaled = self._new(node, aten.mul.Tensor, (operand, self._row_share))
        scaled.meta["val"] = operand.meta["val"]
        self._layouts[scaled] = SUM
        node.replace_input_with(operand, scaled)

    def _share_number(self, node: fx.Node) -> None:
        """`sum + c` to `sum + share * c`, with `c` as the factor of the added number."""
        what = operator_of(node)
        assert what is not None
        args, keywords = positional(node), dict[str, Any](node.kwargs)
        alpha = keywords.get("alpha", args[2] if len(args) > 2 else 1)
        first, second = args[:2]
        subtracts = what.packet in ("aten.sub", "aten.subtract")
        if what.packet == "aten.rsub":
            first, second, alpha, subtracts = second, first, alpha, True
        # Now the result is `first + alpha * second`, or minus.
        sign = -1 if subtracts else 1
        with self._graph.inserting_before(node):
            if isinstance(second, fx.Node) and is_value(second):
                number, factor, tensor = first, self._product(sign, alpha), second
            else:
                number, factor, tensor = self._product(sign, alpha, second), 1, first
            scaled = self._new(node, aten.mul.Tensor, (tensor, factor))
            added = self._new(
                node,
                aten.add.Tensor,
                (scaled, self._row_share),
                {"alpha": self._product(1.0, number)},
            )
        for new in (scaled, added):
            new.meta["val"] = node.meta["val"]
            self._layouts[new] = SUM
        node.replace_all_uses_with(added)
        self._graph.erase_node(node)

    def _product(self, first: Any, *others: Any) -> Any:
        """The product of numbers, some of which may be nodes that compute them."""
        for other in others:
            if isinstance(first, fx.Node) or isinstance(other, fx.Node):
                first = self._graph.call_function(operator.mul, (first, other))
            else:
                first = first * other
        return first

    def _count(self, node: fx.Node) -> None:
        what = operator_of(node)
        assert what is not None
        bound = _bound_arguments(node, what)
        read = [bound["target"], bound.get("weight")]
        dtype = torch.promote_types(node.meta["val"].dtype, torch.float32)
        finish = _CountTargets(int(bound["ignore_index"]), dtype)
        denominator = self._denominator(
            [tensor for tensor in read if isinstance(tensor, fx.Node)],
            finish,
            node.meta["val"].detach().to(dtype),
        )
        index = _argument_names(what).index("reduction")
        if index < len(node.args):
            node.update_arg(index, _SUM)
        else:
            node.update_kwarg("reduction", _SUM)
        divided = self._append(node, aten.div.Tensor, denominator)
        if dtype != node.meta["val"].dtype:
            self._append(divided, aten.to.dtype, node.meta["val"].dtype)

    def _append(self, node: fx.Node, target: Any, operand: Any) -> fx.Node:
        with self._graph.inserting_after(node):
            scaled = self._new(node, target, (node, operand))
        scaled.meta["val"] = node.meta["val"]
        self._layouts[scaled] = self._layouts[node]
        node.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)
        return scaled

    def _new(
        self, beside: fx.Node, target: Any, args: tuple[Any, ...], kwargs: Any = None
    ) -> fx.Node:
        what = operator_of(beside)
        assert what is not None
        new = self._graph.call_function(target, args, kwargs or {})
        new.meta["operator"] = Operator(target, what.module)
        return new

    def _denominator(
        self, read: list[fx.Node], finish: Callable[..., torch.Tensor], example: torch.Tensor
    ) -> fx.Node:
        last = next(n for n in reversed(list(self._graph.nodes)) if n.op == "placeholder")
        with self._graph.inserting_after(last):
            placeholder = self._graph.placeholder(f"denominator_{len(self.denominators)}")
        placeholder.meta["val"] = None
        placeholder.meta["example"] = example
        part = cut(self._module, self._inputs, read, name="Denominator", always=("rows",))
        layouts = [self._layouts[node] for node in self._inputs]
        batch_input, dim = next((i, w.dim) for i, w in enumerate(layouts) if isinstance(w, Split))
        self.denominators.append(Denominator(part, finish, batch_input, dim))
        return placeholder


def _bound_arguments(node: fx.Node, what: Operator) -> dict[str, Any]:
    assert isinstance(what.target, torch._ops.OpOverload)
    bound = {
        argument.name: argument.default_value
        for argument in what.target._schema.arguments
        if argument.has_default_value()
    }
    named = dict(zip(_argument_names(what), positional(node), strict=False))
    return {**bound, **named, **node.kwargs}


def _argument_names(what: Operator) -> list[str]:
    assert isinstance(what.target, torch._ops.OpOverload)
    return [argument.name for argument in what.target._schema.arguments]
