"""Has the exporter look at each distinct operator once.

The exporter finds the results of an operator by running it on tensors without data, which for
`linear` or attention means dozens of smaller operators, each with symbolic sizes. A model of equal
layers calls few distinct operators: what an operator gives depends only on the sizes, strides,
types and plain values it is given. So the first call runs, and later calls with equal arguments
get results like the first's.

Operators that write to their arguments or whose sizes depend on data always run. Views that are
made like earlier ones do not lie in the memory of what they show; where such memory is written to,
and where a model differentiates inside its forward, real results are needed: `RealNeededError`, and
the model is exported again without.

This replaces a private function of torch; where another version of torch has it otherwise,
everything works as it does without.
"""

from __future__ import annotations

import contextlib
import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch._dispatch.python import no_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, in_kernel_invocation_manager
from torch.utils import _pytree as pytree

from ._program_place import RAN_AT, place_now
from ._progress import progress

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator

_NEVER = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


class RealNeededError(Exception):
    """Occurs when a model needs more of a result than its sizes and type."""


@dataclass(slots=True)
class Repeats:
    """What may be made like earlier ones, and whether anything was."""

    views: bool
    any: bool = False


@dataclass(frozen=True, slots=True)
class _Tensor:
    """What a result is like.

    Attributes:
        example: a result without history; results like it have its sizes, strides and type.
        bare: the same without the exporter's part.
        device: where results lie.
        requires_grad: whether they require gradients.
        is_view: whether they share memory with what was read.
        same: the position, among the tensors read, of the one that is the result.
    """

    example: FakeTensor
    bare: torch.Tensor
    device: torch.device
    requires_grad: bool
    is_view: bool
    same: int | None


class _Result(torch.autograd.Function):
    """Gives made results a place in the history of their arguments."""

    @staticmethod
    def forward(ctx: Any, made: list[torch.Tensor], keep: list[bool], *read: Any) -> Any:
        del read
        ctx.mark_non_differentiable(
            *(tensor for tensor, grad in zip(made, keep, strict=True) if not grad)
        )
        return tuple(made)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        del ctx, gradients
        raise RealNeededError


_apply = torch._C._FunctionBase.__dict__["apply"].__get__(None, _Result)


@contextlib.contextmanager
def traced_once(*, views: bool) -> Iterator[Repeats]:
    """Has operators traced once while the body exports a model.

    Args:
        views: also those whose results share memory with their arguments.
    """
    repeats = Repeats(views)
    try:
        proxies = importlib.import_module("torch.fx.experimental.proxy_tensor")
        tracer = _Tracer(proxies, repeats)
    except (ImportError, AttributeError):
        yield repeats
        return
    original = proxies.proxy_call
    with progress("capturing", "operators") as bar:

        def call(mode: Any, *args: Any) -> Any:
            bar.update()
            graph = mode.tracer.graph
            last = graph._root._prev
            result = tracer.call(mode, *args)
            _note_place(graph, last)
            return result

        setattr(proxies, "proxy_call", call)  # noqa: B010
        try:
            yield repeats
        finally:
            setattr(proxies, "proxy_call", original)  # noqa: B010


def _note_place(graph: torch.fx.Graph, last: torch.fx.Node) -> None:
    """Notes on the nodes that a graph has got since the last one where in the program it is."""
    place, node = place_now(), graph._root._prev
    while node is not last and node is not graph._root:
        node.meta[RAN_AT] = place
        node = node._prev


class _Tracer:
    """Stands in for the exporter's own tracing of an operator."""

    def __init__(self, proxies: Any, repeats: Repeats) -> None:
        self._repeats = repeats
        self._original: Callable[..., Any] = proxies.proxy_call
        self._proxies_of: Callable[..., Any] = proxies._fetch_proxies_and_all_constant_flag
        self._slot: Callable[..., Any] = proxies.set_proxy_slot
        self._in_slot: Callable[..., Any] = proxies._ProxyTensor
        self._sizes_when_used: Callable[..., Any] = proxies._enable_thunkify
        # None for operators that always run.
        self._known: dict[Hashable, list[_Tensor] | None] = {}
        # Memory that tensors only seem to share, by address.
        self._apart: dict[int, torch.UntypedStorage] = {}

    def call(self, mode: Any, func: Any, pre_dispatch: bool, args: Any, kwargs: Any) -> Any:  # noqa: FBT001
        """Traces one call of an operator."""
        if self._apart:
            self._check_writes(func, args, kwargs)
        flat, spec = pytree.tree_flatten((args, kwargs))
        key = _key(mode, func, flat, spec) if pre_dispatch else None
        if key is None:
            return self._original(mode, func, pre_dispatch, args, kwargs)
        if key not in self._known:
            read = [item for item in flat if isinstance(item, torch.Tensor)]
            versions = [tensor._version for tensor in read]
            result = self._original(mode, func, pre_dispatch, args, kwargs)
            written = versions != [tensor._version for tensor in read]
            with self._sizes_when_used(mode.tracer):
                self._known[key] = None if written else self._description(read, result)
            return result
        known = self._known[key]
        if known is None:
            return self._original(mode, func, pre_dispatch, args, kwargs)
        _, proxies, constant = self._proxies_of(flat, mode.tracer)
        if constant:
            return self._original(mode, func, pre_dispatch, args, kwargs)
        with self._sizes_when_used(mode.tracer):
            return self._repeat(mode, func, known, flat, pytree.tree_unflatten(proxies, spec))

    def _repeat(
        self, mode: Any, func: Any, known: list[_Tensor], flat: list[Any], proxies: Any
    ) -> Any:
        self._repeats.any = True
        tracer = mode.tracer
        name = tracer.graph._target_to_str(func.overloadpacket.__name__)
        proxy = tracer.create_proxy("call_function", func, *proxies, name=name)
        read = [item for item in flat if isinstance(item, torch.Tensor)]
        made = _made(known, read)
        if known[0].is_view:
            for tensor in (known[0].bare, *read):
                storage = tensor.untyped_storage()
                self._apart.setdefault(storage._cdata, storage)
        many = len(func._schema.returns) > 1
        with torch._C.DisableTorchFunction():
            for index, (result, like) in enumerate(zip(made, known, strict=True)):
                place = proxy[index] if many else proxy
                place.node.meta["val"] = like.example
                # The first such result stands for the sizes, which are the same expressions.
                self._slot(result, tracer, self._in_slot(place, None))
        if many:
            proxy.node.meta["val"] = tuple(like.example for like in known)
        return tuple(made) if many else made[0]

    def _check_writes(self, func: Any, args: Any, kwargs: Any) -> None:
        """Refuses to write where tensors only seem to share memory, or only seem not to."""
        if not isinstance(func, torch._ops.OpOverload) or not func._schema.is_mutable:
            return
        for index, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            given = args[index] if index < len(args) else kwargs.get(argument.name)
            for tensor in pytree.tree_leaves(given):
                is_tensor = isinstance(tensor, torch.Tensor)
                if is_tensor and tensor.untyped_storage()._cdata in self._apart:
                    raise RealNeededError

    def _description(self, read: list[torch.Tensor], result: Any) -> list[_Tensor] | None:
        results = [result] if isinstance(result, torch.Tensor) else result
        if not isinstance(results, tuple | list) or not results:
            return None
        storages = {tensor.untyped_storage()._cdata for tensor in read}
        described = []
        for tensor in results:
            if type(tensor) is not FakeTensor or tensor.layout != torch.strided:
                return None
            same = [i for i, one in enumerate(read) if one is tensor]
            storage = tensor.untyped_storage()._cdata
            shares = storage in storages
            if (shares or same) and not (self._repeats.views and len(results) == 1):
                return None
            storages.add(storage)
            described.append(
                _Tensor(
                    cast("FakeTensor", tensor.detach()),
                    _without_mode(tensor),
                    tensor.device,
                    tensor.requires_grad,
                    shares,
                    same[0] if same else None,
                )
            )
        return described


def _without_mode(tensor: FakeTensor) -> torch.Tensor:
    with no_python_dispatcher(), in_kernel_invocation_manager(tensor.fake_mode):
        bare: torch.Tensor = torch.ops.aten.detach.default(tensor)
        # What torch finds out about symbolic sizes, copies of the tensor know as well.
        bare.is_contiguous()
    return bare


def _made(known: list[_Tensor], read: list[torch.Tensor]) -> list[torch.Tensor]:
    if known[0].same is not None:
        return [read[known[0].same]]
    fake_mode = known[0].example.fake_mode
    with torch._C.DisableTorchFunction():
        made: list[torch.Tensor] = []
        for result in known:
            elem = result.bare if result.is_view else _in_own_memory(fake_mode, result.bare)
            made.append(FakeTensor(fake_mode, elem, result.device))
        if any(result.requires_grad for result in known):
            made = list(_apply(made, [result.requires_grad for result in known], *read))
        return made


def _in_own_memory(fake_mode: Any, bare: torch.Tensor) -> torch.Tensor:
    """A tensor alike in memory of its own.

    Unlike a new one, a lazy clone takes over what is known of symbolic sizes, at a tenth of the
    time. Its memory is never copied, since there is none.
    """
    with in_kernel_invocation_manager(fake_mode):
        clone: torch.Tensor = bare._lazy_clone()
    return clone


def _key(mode: Any, func: Any, flat: list[Any], spec: Any) -> Hashable | None:
    """Equal for calls with results alike; `None` for operators that always run."""
    if not isinstance(func, torch._ops.OpOverload) or func.namespace != "aten":
        return None
    if func in mode.decomposition_table or torch._C._functorch.peek_interpreter_stack() is not None:
        return None
    if func._schema.is_mutable or any(tag in func.tags for tag in _NEVER):
        return None
    parts: list[Hashable] = [func, spec, torch.is_grad_enabled(), _autocast()]
    for item in flat:
        part = _part(item)
        if part is None:
            return None
        parts.append(part)
    return tuple(parts)


def _part(item: Any) -> Hashable | None:
    if isinstance(item, torch.Tensor):
        if type(item) is not FakeTensor or item.layout != torch.strided:
            return None
        return (
            *(_number(size) for size in item.size()),
            *(_number(stride) for stride in item.stride()),
            item.dtype,
            item.fake_device,
            item.requires_grad,
        )
    if isinstance(item, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return _number(item)
    if item is None or isinstance(
        item, (bool, int, float, str, torch.dtype, torch.device, torch.layout, torch.memory_format)
    ):
        return (type(item), item)
    return None


def _number(number: Any) -> Hashable:
    return number if isinstance(number, int) else number.node.expr


def _autocast() -> Hashable:
    if not torch.is_autocast_enabled("cpu") and not torch.is_autocast_enabled("cuda"):
        return None
    return tuple(
        (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
        for device in ("cpu", "cuda")
    )
