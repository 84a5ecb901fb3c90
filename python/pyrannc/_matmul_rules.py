"""Where rows lie in the results of products of matrices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._layout import NONE, Content, Layout, MixesRows, Split, merge, placed

if TYPE_CHECKING:
    from collections.abc import Callable

    from ._rows import Call


def _product(call: Call, left: Any, right: Any) -> Split:
    """The layout of `left @ right` with the dimension counted from the end (negative)."""
    first, second = call.layout(left), call.layout(right)
    ndims = (len(call.shape(left)), len(call.shape(right)))
    found: Split | None = None
    for layout, ndim, inner_dim, width in (
        (first, ndims[0], -1, 1 if ndims[1] > 1 else 0),
        (second, ndims[1], -2 if ndims[1] > 1 else -1, 1 if ndims[0] > 1 else 0),
    ):
        if layout is NONE:
            continue
        if not isinstance(layout, Split) or layout.content is Content.INDEX:
            raise MixesRows("computes with the numbers of the rows")
        from_end = layout.dim - ndim
        if from_end == inner_dim:
            raise MixesRows("sums products over the batch")
        found = merge(found, layout.at(_position(from_end, inner_dim, width)))
    assert found is not None
    return found


def _position(from_end: int, inner_dim: int, width: int) -> int:
    """Where a factor's dimension ends up in the product, counted from the end.

    `width` is how many dimensions the other factor contributes at the end (left factor) or before
    it (right factor).
    """
    if inner_dim == -1:
        return from_end + 1 - width if from_end < -1 else from_end
    if from_end == -1:
        return -1
    return from_end + 1 - width


def _batched(call: Call, left: Any, right: Any) -> list[Layout]:
    first, second = call.layout(left), call.layout(right)
    in_batch = [
        isinstance(layout, Split) and layout.dim < len(call.shape(tensor)) - 2
        for layout, tensor in ((first, left), (second, right))
    ]
    if first is not NONE and second is not NONE and not all(in_batch):
        raise MixesRows("multiplies rows with other rows")
    source = _product(call, left, right)
    return [placed(call.shape(output), source) for output in call.outputs]


def _matmul(call: Call) -> list[Layout]:
    return _batched(
        call, call["self"], call["other"] or call["mat2"] or call["vec"] or call["vec2"]
    )


def _with_sum(call: Call) -> list[Layout]:
    left = call["mat1"] or call["batch1"] or call["mat"]
    layouts = _batched(call, left, call["mat2"] or call["batch2"] or call["vec"])
    added = call.layout(call["self"])
    if isinstance(added, Split):
        shape = call.shape(call.outputs[0])
        source = layouts[0]
        assert isinstance(source, Split)
        merge(source, added.at(added.dim + len(shape) - len(call.shape(call["self"]))))
    return layouts


def _linear(call: Call) -> list[Layout]:
    source = call.layout(call["input"])
    if any(call.layout(call[name]) is not NONE for name in ("weight", "bias")):
        raise MixesRows("uses rows as weights")
    if not isinstance(source, Split) or source.content is Content.INDEX:
        raise MixesRows("computes with the numbers of the rows")
    if source.dim == len(call.shape(call["input"])) - 1:
        raise MixesRows("sums products over the batch")
    return [placed(call.shape(output), source) for output in call.outputs]


def _einsum(call: Call) -> list[Layout]:
    """The rows must have the same letter in every argument that has rows, and in the result."""
    equation = str(call["equation"]).replace(" ", "")
    left, _, result = equation.partition("->")
    terms = left.split(",")
    width = max(
        [0]
        + [
            len(call.shape(tensor)) - len(term) + 3
            for term, tensor in zip(terms, call["tensors"], strict=True)
            if "..." in term
        ]
    )
    if "->" not in equation:
        letters = sorted(set(left) - {",", "."})
        result = ("..." if "..." in left else "") + "".join(
            letter for letter in letters if left.count(letter) == 1
        )
    found: Split | None = None
    rows_letter: str | None = None
    for term, tensor in zip(terms, call["tensors"], strict=True):
        layout = call.layout(tensor)
        if layout is NONE:
            continue
        if not isinstance(layout, Split) or layout.content is Content.INDEX:
            raise MixesRows("computes with the numbers of the rows")
        letter = _spelled(term, len(call.shape(tensor)), width)[layout.dim]
        if rows_letter not in (None, letter):
            raise MixesRows("pairs rows with rows")
        rows_letter = letter
        found = merge(found, layout.at(0))
    if found is None or rows_letter not in _spelled(result, None, width):
        raise MixesRows("sums products over the batch")
    return [placed(call.shape(output), found) for output in call.outputs]


def _spelled(term: str, ndim: int | None, width: int) -> list[str]:
    """A term with a numeral for each dimension of its ellipsis, counted from the right."""
    if "..." not in term:
        return list(term)
    before, after = term.split("...")
    num_hidden = width if ndim is None else ndim - len(before) - len(after)
    hidden = [str(number) for number in range(width - num_hidden, width)]
    return [*before, *hidden, *after]


MATMULS: dict[str, Callable[[Call], list[Layout]]] = {
    "aten.linear": _linear,
    "aten.matmul": _matmul,
    "aten.mm": _matmul,
    "aten.bmm": _matmul,
    "aten.mv": _matmul,
    "aten.addmm": _with_sum,
    "aten.baddbmm": _with_sum,
    "aten.addmv": _with_sum,
    "aten.einsum": _einsum,
}
