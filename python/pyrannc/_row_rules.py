"""Where rows lie in the results of each operator, given where they lie in its arguments.

Rules go by families of operators. The result's dimension that grows with the batch holds its rows;
what a family's rule checks is that the operator never looks from one row at another. Operators of
no family are tried out on random numbers (`_probe`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ._flat import written_arguments
from ._layout import (
    NONE,
    SUM,
    Content,
    Layout,
    MixesRows,
    Split,
    merge,
    only_batch_dim,
    placed,
    reshaped,
)
from ._losses import LOSSES, Rewrite, loss_layout
from ._matmul_rules import MATMULS
from ._opaque import Opaque
from ._probe import probed, probed_opaque
from ._sizes import degree_in_rows, depends_on_rows, rows_factor

if TYPE_CHECKING:
    from ._rows import Call

Rule = Callable[["Call"], list[Layout]]

_ELEMENTWISE = {
    "aten.alpha_dropout", "aten.celu", "aten.clone", "aten.contiguous", "aten.detach",
    "aten.dropout", "aten.empty_like", "aten.fake_quantize_per_tensor_affine",
    "aten.feature_alpha_dropout", "aten.feature_dropout", "aten.float_power", "aten.full_like",
    "aten.gelu", "aten.hardtanh", "aten.isclose", "aten.isin", "aten.isreal", "aten.lerp",
    "aten.masked_fill", "aten.native_dropout", "aten.ones_like", "aten.prelu",
    "aten.rand_like", "aten.randint_like", "aten.randn_like", "aten.relu6", "aten.rrelu",
    "aten.selu", "aten.to", "aten.type_as", "aten.zeros_like", "aten._to_copy", "aten.where",
    "aten.alias", "aten.clamp", "aten.fill", "aten.bernoulli", "aten.uniform", "aten.normal",
    "aten.zero", "aten.copy", "aten.lift_fresh_copy", "aten.lift", "aten.logical_and",
    "aten.bucketize", "aten.positive", "aten.conj", "aten.resolve_conj", "aten.resolve_neg",
    "aten.square", "aten.special_expit", "aten.exponential", "aten.nan_to_num", "aten.floor_divide",
    "aten.true_divide", "aten.divide", "aten.multiply", "aten.subtract", "aten.absolute",
    "aten.negative", "aten.greater", "aten.less", "aten.greater_equal", "aten.less_equal",
    "aten.not_equal", "aten.__and__", "aten.__or__",
    "aten.__xor__", "aten.polar", "aten.complex", "aten.view_as_complex", "aten.view_as_real",
}  # fmt: skip

_RESHAPES = {
    "aten.view", "aten.reshape", "aten._unsafe_view", "aten._reshape_alias", "aten.flatten",
    "aten.unflatten", "aten.view_as", "aten.reshape_as",
}  # fmt: skip

_MOVES = {
    "aten.permute", "aten.transpose", "aten.t", "aten.numpy_T", "aten.mT", "aten.adjoint",
    "aten.movedim", "aten.moveaxis", "aten.swapaxes", "aten.swapdims", "aten.unsqueeze",
    "aten.squeeze", "aten.expand", "aten.expand_as", "aten.broadcast_to", "aten.real",
    "aten.imag", "aten.one_hot",
}  # fmt: skip

_ALONG_DIMS = {
    "aten.softmax", "aten._softmax", "aten.log_softmax", "aten._log_softmax", "aten.softmin",
    "aten._safe_softmax", "aten.cumsum", "aten.cumprod", "aten.cummax", "aten.cummin",
    "aten.logcumsumexp", "aten.sort", "aten.argsort", "aten.msort", "aten.topk", "aten.kthvalue",
    "aten.mode", "aten.median", "aten.nanmedian", "aten.quantile", "aten.argmax", "aten.argmin",
    "aten.flip", "aten.roll", "aten.logsumexp", "aten.norm", "aten.linalg_vector_norm",
    "aten.amax", "aten.amin", "aten.max", "aten.min", "aten.var", "aten.std", "aten.var_mean",
    "aten.std_mean", "aten.prod", "aten.any", "aten.all", "aten.select", "aten.slice",
    "aten.narrow", "aten.split", "aten.split_with_sizes", "aten.chunk", "aten.tensor_split",
    "aten.unbind", "aten.unfold", "aten.glu", "aten.cat", "aten.concat", "aten.concatenate",
    "aten.stack", "aten.gather", "aten.take_along_dim", "aten.index_select", "aten.scatter",
    "aten.scatter_add", "aten.scatter_reduce", "aten.index_add", "aten.index_copy",
    "aten.index_fill", "aten.repeat_interleave", "aten.diff", "aten.renorm", "aten.aminmax",
    "aten.cosine_similarity", "aten.diagonal", "aten.diag_embed", "aten.cross",
    "aten.linalg_cross", "aten.select_scatter", "aten.slice_scatter", "aten.nansum",
    "aten.nanmean", "aten.rot90", "aten.count_nonzero", "aten.sum", "aten.mean", "aten.trapz",
    "aten.split_copy", "aten.unbind_copy", "aten.fft_fft", "aten.fft_ifft", "aten.fft_rfft",
    "aten.fft_irfft", "aten.fft_fft2", "aten.fft_ifft2", "aten.fft_rfft2", "aten.fft_irfft2",
}  # fmt: skip

# How many trailing dimensions an operator works on; rows must lie before them.
_TRAILING = {
    "aten.pairwise_distance": 1,
    "aten.avg_pool1d": 2, "aten.max_pool1d": 2, "aten.adaptive_avg_pool1d": 2,
    "aten.adaptive_max_pool1d": 2, "aten.max_pool1d_with_indices": 2,
    "aten.avg_pool2d": 3, "aten.max_pool2d": 3, "aten.adaptive_avg_pool2d": 3,
    "aten.adaptive_max_pool2d": 3, "aten.max_pool2d_with_indices": 3,
    "aten._adaptive_avg_pool2d": 3, "aten.fractional_max_pool2d": 3,
    "aten.avg_pool3d": 4, "aten.max_pool3d": 4, "aten.adaptive_avg_pool3d": 4,
    "aten.adaptive_max_pool3d": 4, "aten.max_pool3d_with_indices": 4,
    "aten._adaptive_avg_pool3d": 4,
    "aten.upsample_linear1d": 2, "aten.upsample_nearest1d": 2, "aten._upsample_nearest_exact1d": 2,
    "aten.upsample_bilinear2d": 3, "aten.upsample_nearest2d": 3, "aten.upsample_bicubic2d": 3,
    "aten._upsample_nearest_exact2d": 3, "aten._upsample_bilinear2d_aa": 3,
    "aten._upsample_bicubic2d_aa": 3,
    "aten.upsample_trilinear3d": 4, "aten.upsample_nearest3d": 4,
    "aten._upsample_nearest_exact3d": 4,
    "aten.pixel_shuffle": 3, "aten.pixel_unshuffle": 3, "aten.channel_shuffle": 3,
    "aten.im2col": 3, "aten.col2im": 2, "aten.lp_pool2d": 3,
    "aten.grid_sampler": 3, "aten.grid_sampler_2d": 3, "aten.grid_sampler_3d": 4,
    "aten.affine_grid_generator": 2, "aten.triu": 2, "aten.tril": 2,
    "aten.linalg_inv": 2, "aten.linalg_cholesky": 2, "aten.linalg_det": 2,
    "aten.multinomial": 1,
    "aten.conv1d": 2, "aten.conv2d": 3, "aten.conv3d": 4, "aten.conv_transpose1d": 2,
    "aten.conv_transpose2d": 3, "aten.conv_transpose3d": 4, "aten.group_norm": 2,
    "aten.batch_norm": 1, "aten.instance_norm": 2, "aten.native_group_norm": 2,
    "aten.scaled_dot_product_attention": 2, "aten._native_multi_head_attention": 2,
    "aten.lstm_cell": 1, "aten.gru_cell": 1, "aten.rnn_tanh_cell": 1, "aten.rnn_relu_cell": 1,
}  # fmt: skip

# Operators whose rows must lie in the first dimension of every argument that has rows.
_FIRST_DIM = {
    "aten.batch_norm", "aten.instance_norm", "aten.group_norm", "aten.native_group_norm",
    "aten.lstm_cell", "aten.gru_cell", "aten.rnn_tanh_cell", "aten.rnn_relu_cell",
}  # fmt: skip

# Arguments that must not hold rows: weights, tables, statistics.
_STATE_ARGUMENTS = (
    "weight", "bias", "running_mean", "running_var", "w_ih", "w_hh", "b_ih", "b_hh",
)  # fmt: skip


def layouts_of(call: Call) -> list[Layout]:
    """The layouts of an operator's results when no argument is a sum over rows.

    Raises:
        MixesRows: when it computes across rows.
    """
    packet = call.operator.packet
    if all(call.layout(tensor) is NONE for tensor in call.tensors):
        return _made_from_sizes(call)
    if isinstance(call.operator.target, Opaque):
        return probed_opaque(call, call.operator.target)
    if packet in LOSSES:
        return loss_layout(call)
    rule = _rule(call, packet)
    if rule is None:
        return probed(call)
    return rule(call)


def _rule(call: Call, packet: str) -> Rule | None:
    target = call.operator.target
    if isinstance(target, torch._ops.OpOverload) and target._overloadname == "other":
        return _elementwise
    if packet in _RULES:
        return _RULES[packet]
    if packet in MATMULS:
        return MATMULS[packet]
    if packet in _TRAILING:
        return _trailing
    if packet in _RESHAPES:
        return _reshape
    if packet in _ALONG_DIMS:
        return _along_dims
    if packet in _MOVES:
        return _move
    pointwise = isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags
    return _elementwise if pointwise or packet in _ELEMENTWISE else None


def _made_from_sizes(call: Call) -> list[Layout]:
    """Results of operators that read nothing of the batch but its size."""
    if not call.numbers_of_rows and not any(
        depends_on_rows(length) for output in call.outputs for length in call.shape(output)
    ):
        return [NONE for _ in call.outputs]
    packet = call.operator.packet
    if scales_with_rows(call):
        return [NONE for _ in call.outputs]
    if packet == "aten.repeat":
        dims = [only_batch_dim(call.shape(output)) for output in call.outputs]
        return [Split(dim, 1, factor) for dim, factor in dims]
    made = [placed(call.shape(output), None) for output in call.outputs]
    if packet == "aten.arange":
        if call["end"] is None or rows_factor(call["end"]) != 1 or call["start"]:
            raise MixesRows("computes with the numbers of the rows")
        return [Split(0, 1, 1, Content.INDEX)]
    if packet in _SAME_FOR_ALL_ROWS:
        _refuse_number_of_rows(call["fill_value"], call["value"])
        return list(made)
    raise MixesRows("makes a tensor of the batch's size")


_SAME_FOR_ALL_ROWS = {
    "aten.zeros", "aten.ones", "aten.full", "aten.empty", "aten.new_zeros", "aten.new_ones",
    "aten.new_full", "aten.new_empty", "aten.rand", "aten.randn", "aten.randint", "aten.expand",
    "aten.broadcast_to", "aten.empty_strided", "aten.bernoulli", "aten.normal",
}  # fmt: skip


def _refuse_number_of_rows(*numbers: Any) -> None:
    if any(depends_on_rows(number) for number in numbers):
        raise MixesRows("computes with the number of rows")


def scales_with_rows(call: Call) -> bool:
    """Whether an operator multiplies or divides by the number of rows; notes the rewriting.

    Dividing by the rows of a part and multiplying by the part's share of the batch is dividing by
    the rows of the batch.
    """
    numbers = call.numbers_of_rows
    packet = call.operator.packet
    if packet not in ("aten.mul", "aten.div", "aten.multiply", "aten.divide", "aten.true_divide"):
        return False
    if len(numbers) != 1 or call["rounding_mode"] is not None:
        return False
    degree = degree_in_rows(numbers[0])
    floating = all(output.meta["val"].is_floating_point() for output in call.outputs)
    if degree == 0 or not floating or written_arguments(call.node):
        return False
    # Multiplying by the rows of a part is too little by the part's share of the batch.
    power = degree if "div" in packet else -degree
    call.rewrites.append(Rewrite("share", call.node, power=power))
    return True


def merged(call: Call, tensors: list[fx.Node], ndim: int) -> Split:
    """The common layout of tensors that are broadcast against each other."""
    found: Split | None = None
    for tensor in tensors:
        layout = call.layout(tensor)
        if isinstance(layout, Split):
            found = merge(found, layout.at(layout.dim + ndim - len(call.shape(tensor))))
    assert found is not None
    return found


def kept(call: Call, source: Split) -> list[Layout]:
    """Layouts of results that keep the order of `source`'s rows."""
    return [placed(call.shape(output), source) for output in call.outputs]


def _elementwise(call: Call) -> list[Layout]:
    if call.numbers_of_rows and not scales_with_rows(call):
        raise MixesRows("computes with the number of rows")
    ndim = max(len(call.shape(output)) for output in call.outputs) if call.outputs else 0
    tensors = call.tensors
    if not call.outputs:
        return []
    if call.operator.packet in ("aten.to", "aten.type_as"):
        tensors = [call["self"]]
        if call.layout(call["self"]) is NONE:
            return [NONE]
    if call.operator.packet in ("aten.isin", "aten.bucketize"):
        tensors = [
            tensor for tensor in tensors if tensor is call["elements"] or tensor is call["self"]
        ]
        if any(call.layout(tensor) is not NONE for tensor in call.tensors if tensor not in tensors):
            raise MixesRows("looks each row up in all rows")
    if call.operator.packet == "aten.prelu" and call.layout(call["weight"]) is not NONE:
        raise MixesRows("uses rows as weights")
    source = merged(call, tensors, ndim)
    if source.content is Content.INDEX and call.operator.packet not in _INDEX_KEEPING:
        raise MixesRows("computes with the numbers of the rows")
    if call.operator.packet in ("aten.view_as_complex", "aten.view_as_real"):
        return _move(call)
    return kept(call, source)


_INDEX_KEEPING = {"aten.to", "aten._to_copy", "aten.clone", "aten.contiguous", "aten.detach"}


def _reshape(call: Call) -> list[Layout]:
    before, source = call.shape(call["self"]), call.layout(call["self"])
    if not isinstance(source, Split):
        raise MixesRows("takes a shape from the batch")
    return [reshaped(before, source, call.shape(output)) for output in call.outputs]


def _move(call: Call) -> list[Layout]:
    source = call.layout(call["self"])
    if not isinstance(source, Split):
        return [placed(call.shape(output), None) for output in call.outputs]
    return kept(call, source)


def _along_dims(call: Call) -> list[Layout]:
    """Operators that work along the dimensions named in their arguments."""
    tensors = [tensor for tensor in call.tensors if isinstance(call.layout(tensor), Split)]
    ndim = len(call.shape(tensors[0]))
    sources = [tensor for tensor in call.tensors if len(call.shape(tensor)) == ndim]
    if len(sources) != len(call.tensors):
        extra = [tensor for tensor in call.tensors if tensor not in sources]
        if any(call.layout(tensor) is not NONE for tensor in extra):
            raise MixesRows("combines rows of tensors with different dimensions")
    source = merged(call, tensors, ndim)
    if source.content is Content.INDEX and call.operator.packet not in ("aten.expand",):
        raise MixesRows("computes with the numbers of the rows")
    if source.dim in _dims(call, ndim):
        return _reduced(call)
    if len(tensors) < len(sources):
        _check_constants(call, sources, source)
    return kept(call, source)


_DIM_ARGUMENTS = ("dim", "dims", "dim0", "dim1", "dim2", "dimension", "axis")


def _dims(call: Call, ndim: int) -> set[int]:
    """The dimensions that an operator works along."""
    given = [call[name] for name in _DIM_ARGUMENTS if name in call.arguments]
    dims: set[int] = set()
    for item in given:
        if item is None or item == []:
            return set(range(ndim))
        dims |= set(item) if isinstance(item, list) else {item}
    if call.operator.packet == "aten.stack":
        position = call["dim"] % (ndim + 1)
        return {-1} if position <= ndim else set()
    if call.operator.packet in ("aten.diag_embed",):
        return {ndim - 1}
    if not given:
        return set(range(ndim))
    return {dim % ndim for dim in dims}


def _check_constants(call: Call, sources: list[fx.Node], source: Split) -> None:
    """Tensors without rows can only be used along other dimensions when they broadcast."""
    for tensor in sources:
        if call.layout(tensor) is NONE and call.shape(tensor)[source.dim] != 1:
            raise MixesRows("combines rows with a tensor of fixed size")


def _reduced(call: Call) -> list[Layout]:
    """Reductions over the dimension of the rows."""
    packet = call.operator.packet
    if packet in ("aten.sum", "aten.nansum", "aten.count_nonzero"):
        return [SUM]
    if packet == "aten.mean":
        call.rewrites.append(Rewrite("share", call.node, power=1))
        return [SUM]
    raise MixesRows("works along the dimension of the batch")


def _trailing(call: Call) -> list[Layout]:
    """Operators on the last dimensions of each argument that has rows."""
    packet = call.operator.packet
    num_trailing = _TRAILING[packet]
    source: Split | None = None
    for tensor in call.tensors:
        layout, ndim = call.layout(tensor), len(call.shape(tensor))
        if not isinstance(layout, Split):
            continue
        if any(tensor is call[name] for name in _STATE_ARGUMENTS):
            raise MixesRows("uses rows as weights")
        if packet in _FIRST_DIM and layout.dim != 0:
            raise MixesRows("works along the dimension of the batch")
        if packet not in _FIRST_DIM and layout.dim >= ndim - num_trailing:
            raise MixesRows("works along the dimension of the batch")
        if layout.content is Content.INDEX:
            raise MixesRows("computes with the numbers of the rows")
        width = max(len(call.shape(output)) for output in call.outputs)
        source = merge(source, layout.at(layout.dim - ndim + width))
    assert source is not None
    return kept(call, source)


def _layer_norm(call: Call) -> list[Layout]:
    source = call.layout(call["input"])
    if not isinstance(source, Split) or any(
        call.layout(call[name]) is not NONE for name in ("weight", "bias")
    ):
        raise MixesRows("uses rows as weights")
    if source.dim >= len(call.shape(call["input"])) - len(call["normalized_shape"]):
        raise MixesRows("works along the dimension of the batch")
    return kept(call, source)


def _embedding(call: Call) -> list[Layout]:
    source = call.layout(call["indices"])
    if call.layout(call["weight"]) is not NONE or not isinstance(source, Split):
        raise MixesRows("looks up rows in a table made of rows")
    if source.content is Content.INDEX:
        raise MixesRows("computes with the numbers of the rows")
    return kept(call, source)


def _pad(call: Call) -> list[Layout]:
    source = call.layout(call["self"])
    assert isinstance(source, Split)
    padded_dims = len(call["pad"] or call["padding"]) // 2
    if source.dim >= len(call.shape(call["self"])) - padded_dims:
        from_end = len(call.shape(call["self"])) - 1 - source.dim
        if any((call["pad"] or call["padding"])[2 * from_end : 2 * from_end + 2]):
            raise MixesRows("works along the dimension of the batch")
    return kept(call, source)


def _repeat_interleave(call: Call) -> list[Layout]:
    source, repeats, dim = call.layout(call["self"]), call["repeats"], call["dim"]
    if dim is None or not isinstance(source, Split) or not isinstance(repeats, int):
        return _along_dims(call)
    if dim % len(call.shape(call["self"])) != source.dim:
        return kept(call, source)
    return kept(call, Split(source.dim, source.outer, source.inner * repeats, source.content))


def _index_select(call: Call) -> list[Layout]:
    source, index = call.layout(call["self"]), call.layout(call["index"])
    if source is NONE and isinstance(index, Split) and index.content is not Content.INDEX:
        return kept(call, index)
    return _along_dims(call)


def _new(call: Call) -> list[Layout]:
    """New tensors that take only the type of another one."""
    _refuse_number_of_rows(call["fill_value"])
    shape = call.shape(call.outputs[0])
    return [placed(shape, None) if any(map(depends_on_rows, shape)) else NONE]


def _repeat(call: Call) -> list[Layout]:
    source = call.layout(call["self"])
    assert isinstance(source, Split)
    dim = source.dim + len(call["repeats"]) - len(call.shape(call["self"]))
    times = call["repeats"][dim]
    if depends_on_rows(times):
        raise MixesRows("pairs rows with rows")
    repeated = Split(dim, source.outer * int(times), source.inner, source.content)
    return [placed(call.shape(output), repeated) for output in call.outputs]


def _index(call: Call) -> list[Layout]:
    """`table[indices]`: rows may index, or be kept, or be met by their own numbers."""
    table, indices = call["self"], call["indices"]
    source = call.layout(table)
    given = [index for index in indices if isinstance(index, fx.Node)]
    ndim = max(len(call.shape(index)) for index in given)
    split = [index for index in given if isinstance(call.layout(index), Split)]
    by_rows = merged(call, split, ndim) if split else None
    if not isinstance(source, Split):
        if by_rows is None or by_rows.content is Content.INDEX:
            raise MixesRows("computes with the numbers of the rows")
        return kept(call, by_rows)
    at_rows = indices[source.dim] if source.dim < len(indices) else None
    if at_rows is None:
        if by_rows is not None:
            raise MixesRows("takes other rows' entries")
        return kept(call, source)
    layout = call.layout(at_rows)
    own = isinstance(layout, Split) and layout.content is Content.INDEX and source.factor == 1
    if not own or by_rows is None or by_rows.factor != 1:
        raise MixesRows("takes rows out of their order")
    return kept(call, Split(by_rows.dim))


def _index_put(call: Call) -> list[Layout]:
    """`table[indices] = values`, with the rows met by their own numbers or not indexed."""
    table, values = call["self"], call["values"]
    source = call.layout(table)
    given = [index for index in call["indices"] if isinstance(index, fx.Node)]
    if not isinstance(source, Split):
        raise MixesRows("stores something of the batch in a tensor without rows")
    at_rows = call["indices"][source.dim] if source.dim < len(call["indices"]) else None
    layout = call.layout(at_rows)
    if isinstance(layout, Split) and layout.content is Content.INDEX and source.factor == 1:
        width = max(len(call.shape(index)) for index in given)
        by_rows = merged(call, [i for i in given if isinstance(call.layout(i), Split)], width)
        stored = call.layout(values)
        if stored is NONE or (isinstance(stored, Split) and by_rows.factor == stored.factor == 1):
            return kept(call, source)
    raise MixesRows("writes to other rows")


def _recurrent(call: Call) -> list[Layout]:
    """LSTM, GRU and plain recurrent layers: states have rows in dimension 1."""
    if call["input"] is None or call["batch_first"] is None:
        raise MixesRows("works on packed sequences")
    sequence = call.layout(call["input"])
    states = call["hx"] if isinstance(call["hx"], list) else [call["hx"]]
    if not isinstance(sequence, Split) or sequence.dim != (0 if call["batch_first"] else 1):
        raise MixesRows("works along the dimension of the batch")
    for state in states:
        layout = call.layout(state)
        if layout is NONE or not isinstance(layout, Split) or layout.dim != 1:
            raise MixesRows("works along the dimension of the batch")
        if layout.content is Content.ROWS:
            merge(sequence.at(1), layout)
    if any(call.layout(tensor) is not NONE for tensor in call["params"]):
        raise MixesRows("uses rows as weights")
    return kept(call, sequence)


_RULES: dict[str, Rule] = {
    "aten.layer_norm": _layer_norm,
    "aten.native_layer_norm": _layer_norm,
    "aten.rms_norm": _layer_norm,
    "aten._fused_rms_norm": _layer_norm,
    "aten.embedding": _embedding,
    "aten.pad": _pad,
    "aten.constant_pad_nd": _pad,
    "aten.reflection_pad1d": _pad,
    "aten.reflection_pad2d": _pad,
    "aten.replication_pad1d": _pad,
    "aten.replication_pad2d": _pad,
    "aten.repeat": _repeat,
    "aten.repeat_interleave": _repeat_interleave,
    "aten.index_select": _index_select,
    "aten.new_zeros": _new,
    "aten.new_ones": _new,
    "aten.new_full": _new,
    "aten.new_empty": _new,
    "aten.index": _index,
    "aten.index_put": _index_put,
    "aten.lstm": _recurrent,
    "aten.gru": _recurrent,
    "aten.rnn_tanh": _recurrent,
    "aten.rnn_relu": _recurrent,
}
