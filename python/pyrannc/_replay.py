"""Runs the flat graph without data, each distinct operator once.

What an operator does depends on the sizes, strides and types of the tensors it reads and on its
plain arguments: the sizes of its results, which of them share memory with an argument, what its
backward keeps, how many floating-point operations it takes. So the first operator of a kind runs
under `FakeTensorMode`, and for all others what it did is applied to descriptions of tensors. In a
model of equal layers that is all but the first layer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch._subclasses import FakeTensorMode
from torch.utils import _pytree as pytree

from ._flat import Scope, Scoped, attribute, is_value, written_arguments
from ._opaque import FlopCounter, Opaque
from ._strides import order_of

if TYPE_CHECKING:
    from collections.abc import Hashable

    from ._flat import Operator

_PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)


class UnclearError(Exception):
    """Occurs when an operator does what descriptions of tensors cannot tell."""


@dataclass(eq=False, slots=True)
class Storage:
    """Memory that tensors share.

    Attributes:
        nbytes: its size.
        saved: whether autograd keeps it, or it is there anyway.
        holders: the descriptions of tensors in it.
    """

    nbytes: int
    saved: bool = False
    holders: int = 0


@dataclass(eq=False, slots=True)
class Described:
    """A tensor without data."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool
    contiguous: bool
    storage: Storage

    def __post_init__(self) -> None:
        self.storage.holders += 1

    @classmethod
    def of(cls, tensor: torch.Tensor, storage: Storage) -> Described:
        """The description of a tensor.

        Raises:
            UnclearError: when there is more to it than sizes and strides.
        """
        if tensor.layout != torch.strided or tensor.is_conj() or tensor.is_neg():
            raise UnclearError
        return cls(
            tuple(tensor.shape),
            tensor.stride(),
            tensor.dtype,
            tensor.device,
            tensor.requires_grad,
            tensor.is_contiguous(),
            storage,
        )

    @property
    def kind(self) -> Hashable:
        """Equal for tensors that operators treat alike."""
        return (self.size, self.stride, self.dtype, self.device, self.requires_grad)


@dataclass(frozen=True, slots=True)
class _New:
    """A result that is no argument: its description, and whose memory it lies in.

    `memory` is the position of an argument, or the number of arguments plus that of the memory
    among those that the operator allocates.
    """

    like: Described
    memory: int


@dataclass(slots=True)
class _Effect:
    """What an operator does.

    Attributes:
        results: positions of arguments that are results, `_New` ones, and what is no tensor.
        spec: how the results are nested.
        allocated: sizes of the memory that results lie in.
        saved: what backward keeps, numbered like `_New.memory`.
        saved_inside: bytes that backward keeps and that no result lies in.
        flops: floating-point operations.
        written: positions of the arguments it writes to.
        grown: positions of the arguments that require gradients afterwards, but not before.
    """

    results: list[Any]
    spec: Any
    allocated: list[int]
    saved: list[int]
    saved_inside: int
    flops: int
    written: list[int]
    grown: list[int]


@dataclass(frozen=True, slots=True)
class Done:
    """What one call of an operator came to."""

    result: Any
    flops: int
    saved_bytes: int
    aliases: list[fx.Node]
    writes: list[fx.Node]


@dataclass(slots=True)
class Replay:
    """Calls operators on descriptions of tensors."""

    _effects: dict[Hashable, _Effect] = field(default_factory=dict)
    _mode: FakeTensorMode = field(
        default_factory=lambda: FakeTensorMode(allow_non_fake_inputs=True)
    )

    def call(
        self, module: fx.GraphModule, node: fx.Node, known: dict[fx.Node, Any], what: Operator
    ) -> Done:
        """Calls one operator; notes in `known` what it does to its arguments.

        Raises:
            UnclearError: when what it does cannot be told.
        """
        read = [one for one in node.all_input_nodes if isinstance(known[one], Described)]
        given = [known[argument] for argument in read]
        places = {argument: _Place(i) for i, argument in enumerate(read)}

        def passed(argument: fx.Node) -> Any:
            return places.get(argument, known[argument])

        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), passed)
        key = (what.target, what.scope, _frozen((args, kwargs)), tuple(t.kind for t in given))
        effect = self._effects.get(key)
        if effect is None:
            _check(what)
            positions = [read.index(argument) for argument in written_arguments(node)]
            target = _target(module, node, what)
            effect = self._observe(target, given, args, kwargs, positions)
            self._effects[key] = effect
        return _applied(effect, read, given)

    def _observe(
        self, target: Any, given: list[Described], args: Any, kwargs: Any, written: list[int]
    ) -> _Effect:
        with self._mode:
            tensors = [_tensor(described, leaf=not written) for described in given]
        versions = [tensor._version for tensor in tensors]
        places = {tensor.untyped_storage()._cdata: i for i, tensor in enumerate(tensors)}
        # Holding the storages keeps their addresses from being used again.
        saved: dict[int, torch.UntypedStorage] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            saved.setdefault(storage._cdata, storage)
            return tensor

        def passed(item: Any) -> Any:
            return tensors[item.position] if isinstance(item, _Place) else item

        args, kwargs = fx.node.map_aggregate((args, kwargs), passed)
        flops = FlopCounter()
        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with self._mode, flops, hooks, torch.enable_grad():
            result = target(*args, **kwargs)
        leaves, spec = pytree.tree_flatten(result)
        allocated: list[int] = []
        results: list[Any] = []
        for leaf in leaves:
            if not isinstance(leaf, torch.Tensor):
                results.append(leaf)
                continue
            same = [i for i, tensor in enumerate(tensors) if tensor is leaf]
            if same:
                results.append(_Place(same[0]))
                continue
            storage = leaf.untyped_storage()
            if storage._cdata not in places:
                places[storage._cdata] = len(tensors) + len(allocated)
                allocated.append(storage.nbytes())
            like = Described.of(leaf, Storage(storage.nbytes()))
            results.append(_New(like, places[storage._cdata]))
        return _Effect(
            results,
            spec,
            allocated,
            [places[address] for address in saved if address in places],
            sum(held.nbytes() for address, held in saved.items() if address not in places),
            flops.total,
            [i for i, t in enumerate(tensors) if i in written or t._version != versions[i]],
            [
                i
                for i, tensor in enumerate(tensors)
                if tensor.requires_grad and not given[i].requires_grad
            ],
        )


@dataclass(frozen=True, slots=True)
class _Place:
    """Stands for a tensor among an operator's arguments."""

    position: int


def _target(module: fx.GraphModule, node: fx.Node, what: Operator) -> Any:
    if isinstance(what.target, Opaque):
        return Scoped(what.target.without_data, what.scope or Scope())
    return attribute(module, node) if node.op == "call_module" else node.target


def _check(what: Operator) -> None:
    """Refuses operators that change sizes or strides of their arguments."""
    if not isinstance(what.target, torch._ops.OpOverload):
        return
    tags, schema = what.target.tags, what.target._schema
    if torch.Tag.inplace_view in tags or (schema.is_mutable and "out" in schema.overload_name):
        raise UnclearError


def _applied(effect: _Effect, read: list[fx.Node], given: list[Described]) -> Done:
    memory = [described.storage for described in given]
    memory += [Storage(nbytes) for nbytes in effect.allocated]
    saved_bytes = effect.saved_inside
    for place in effect.saved:
        if not memory[place].saved:
            memory[place].saved = True
            saved_bytes += memory[place].nbytes
    for position in effect.grown:
        # Whether views of it require gradients too depends on how they were made.
        if given[position].storage.holders > 1:
            raise UnclearError
        given[position].requires_grad = True
    results: list[Any] = []
    for result in effect.results:
        if isinstance(result, _Place):
            results.append(given[result.position])
        elif isinstance(result, _New):
            like = result.like
            results.append(
                Described(
                    like.size,
                    like.stride,
                    like.dtype,
                    like.device,
                    like.requires_grad,
                    like.contiguous,
                    memory[result.memory],
                )
            )
        else:
            results.append(result)
    held = {id(made.storage) for made in results if isinstance(made, Described)}
    written = {id(given[position].storage) for position in effect.written}
    memory_of = [
        (node, id(described.storage))
        for node, described in zip(read, given, strict=True)
        if is_value(node)
    ]
    return Done(
        pytree.tree_unflatten(results, effect.spec),
        effect.flops,
        saved_bytes,
        [node for node, storage in memory_of if storage in held],
        [node for node, storage in memory_of if storage in written],
    )


def describe(tensor: torch.Tensor, storages: dict[int, Storage]) -> Described:
    """The description of a tensor that is there before the graph runs.

    Args:
        tensor: the tensor.
        storages: memory by address; that of the tensor is added.

    Raises:
        UnclearError: when it is of a special type.
    """
    if type(tensor) not in _PLAIN_TYPES or tensor.layout != torch.strided:
        raise UnclearError
    memory = tensor.untyped_storage()
    storage = storages.setdefault(memory._cdata, Storage(memory.nbytes()))
    return Described.of(tensor, storage)


def fresh(size: list[int], like: torch.Tensor) -> Described:
    """The description of a dense tensor of its own."""
    order = order_of(like.shape, like.stride())
    made = torch.empty_permuted(size, order, dtype=like.dtype, device="meta")
    described = Described.of(made, Storage(made.untyped_storage().nbytes()))
    described.device = like.device
    described.requires_grad = like.requires_grad
    return described


def _tensor(described: Described, *, leaf: bool) -> torch.Tensor:
    made = torch.empty_strided(
        described.size, described.stride, dtype=described.dtype, device=described.device
    )
    if not described.requires_grad:
        return made
    if leaf:
        return made.requires_grad_()
    seed = torch.empty((), dtype=described.dtype, device=described.device).requires_grad_()
    return _Child.apply(seed, [made])  # type: ignore[no-any-return]


class _Child(torch.autograd.Function):
    """Gives a tensor a history, so that operators may write to it."""

    @staticmethod
    def forward(ctx: Any, seed: torch.Tensor, made: list[torch.Tensor]) -> torch.Tensor:
        del ctx, seed
        return made[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        del ctx
        return gradients[0].sum(), None


def _frozen(item: Any) -> Hashable:
    """A key for arguments; 1, 1.0 and True differ."""
    if isinstance(item, (list, tuple)):
        return tuple(_frozen(inner) for inner in item)
    if isinstance(item, dict):
        return tuple((name, _frozen(inner)) for name, inner in item.items())
    if isinstance(item, slice):
        return (slice, _frozen((item.start, item.stop, item.step)))
    if isinstance(item, Described):
        raise UnclearError
    return (type(item), item)
