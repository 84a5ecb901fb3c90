"""What a forward changes in the arguments that it is given.

A captured model is given other tensors than the caller holds, in other lists and dictionaries. So
what its forward writes into tensors among its arguments, and puts into or takes out of their
containers, comes with its results and is done to the caller's arguments after every call.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ._structure import Structure, flatten
from .errors import CaptureError

if TYPE_CHECKING:
    from collections.abc import Sequence

Path = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Kept:
    """Something that the caller has passed.

    Attributes:
        path: where it was.
    """

    path: Path


@dataclass(frozen=True, slots=True)
class ArgumentChanges:
    """What a forward left in its arguments.

    Attributes:
        written: positions of the tensors that it wrote to.
        contents: the new content of containers, by where they are: what was passed, or something
            new made of tensors.
        sources: where each of these tensors was passed, or its position among the further results.
    """

    written: tuple[int, ...] = ()
    sources: tuple[Path | int, ...] = ()
    contents: Mapping[Path, list[tuple[Any, Kept | Structure]]] = field(default_factory=dict)

    def apply(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        tensors: Sequence[torch.Tensor],
        results: Sequence[torch.Tensor],
    ) -> None:
        """Does it to the caller's arguments.

        Args:
            args: positional arguments of a call.
            kwargs: its keyword arguments.
            tensors: the tensors among them.
            results: what the model computed for it: see `Arguments`.
        """
        first = len(results) - len(self.written)
        for position, value in zip(self.written, results[first:], strict=True):
            target = tensors[position]
            with torch.inference_mode(target.is_inference()), torch.no_grad():
                target.copy_(value)
        found: dict[Path, Any] = {}
        _walk((args, kwargs), (), found)
        made_of = [results[s] if isinstance(s, int) else found[s] for s in self.sources]
        for path, items in self.contents.items():
            content = [
                (key, found[new.path] if isinstance(new, Kept) else new.build(made_of))
                for key, new in items
            ]
            _fill(found[path], content)


class Arguments:
    """The arguments of one call as they are before it.

    Behind a model's results come new tensors in its arguments, then what tensors among them have
    become that it wrote to.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._arguments = (args, kwargs)
        self._found: dict[Path, Any] = {}
        _walk(self._arguments, (), self._found)
        self._items = {path: _items(item) for path, item in self._found.items()}
        tensors, _, _ = flatten(self._arguments, unknown=lambda _, item: item, symbols=True)
        self._tensors = tensors
        self._versions = [tensor._version for tensor in tensors]

    @property
    def changed(self) -> bool:
        """Whether any container has other content now."""
        return any(
            not _same(items, _items(self._found[path])) for path, items in self._items.items()
        )

    def further(self, unknown: Any) -> tuple[list[torch.Tensor], ArgumentChanges]:
        """New tensors in the containers, and what the call changed.

        Args:
            unknown: gives what stands for an object of unknown type, by its path and itself.
        """
        paths = {id(item): path for path, item in reversed(self._found.items())}
        contents: dict[Path, list[tuple[Any, Kept | Structure]]] = {}
        new: list[Any] = []
        for path, before in self._items.items():
            items = _items(self._found[path])
            if _same(before, items):
                continue
            contents[path] = []
            for key, item in items:
                if id(item) in paths:
                    contents[path].append((key, Kept(paths[id(item)])))
                else:
                    contents[path].append((key, Structure("tensor", len(new))))
                    new.append(item)
        tensors, _, structure = flatten(new, unknown=unknown, root="argument")
        for items_of in contents.values():
            for number, (key, item) in enumerate(items_of):
                if isinstance(item, Structure):
                    items_of[number] = (key, structure.children[item.value])
        written = self.written
        if any(self._tensors[position].requires_grad for position in written):
            raise written_with_gradient()
        further = [tensor for tensor in tensors if id(tensor) not in paths]
        numbers = {id(tensor): number for number, tensor in enumerate(further)}
        sources = tuple(paths.get(id(t), numbers.get(id(t), 0)) for t in tensors)
        return further, ArgumentChanges(written, sources, contents)

    @property
    def written(self) -> tuple[int, ...]:
        """Positions of the tensors that were written to."""
        pairs = enumerate(zip(self._tensors, self._versions, strict=True))
        return tuple(i for i, (tensor, version) in pairs if tensor._version != version)

    def as_left(self, results: list[torch.Tensor]) -> list[torch.Tensor]:
        """The results, then what was written to; of that, copies."""
        copies = {id(self._tensors[i]): self._tensors[i].clone() for i in self.written}
        return [*(copies.get(id(tensor), tensor) for tensor in results), *copies.values()]


def written_with_gradient() -> CaptureError:
    """The error for a forward that writes to a tensor among its arguments that has a gradient."""
    return CaptureError(
        "forward changes an argument in place through which gradients flow",
        hint="change a copy of it, and return that",
    )


def check_apart(tensors: Sequence[torch.Tensor], names: Sequence[str], written: int) -> None:
    """Refuses to write to an argument that shares memory with another one.

    Args:
        tensors: the tensors among the caller's arguments.
        names: their names.
        written: the position of the one that is written to.
    """
    first, last, storage = _extent(tensors[written])
    for position, other in enumerate(tensors):
        begin, end, memory = _extent(other)
        if position != written and memory == storage and begin < last and first < end:
            raise CaptureError(
                f"forward changes its argument `{names[written]}` in place, which shares memory "
                f"with `{names[position]}`",
                hint="pass a copy of one of them",
            )


def _extent(tensor: torch.Tensor) -> tuple[int, int, int]:
    """Where its entries begin and end in memory, and in which."""
    if tensor.layout is not torch.strided or tensor.numel() == 0:
        return 0, 0, 0
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    reach = 1 + sum((length - 1) * int(stride) for length, stride in sizes)
    begin = int(tensor.storage_offset())
    width = tensor.element_size()
    return begin * width, (begin + reach) * width, tensor.untyped_storage().data_ptr()


def _walk(item: Any, path: Path, found: dict[Path, Any]) -> None:
    """Notes tensors and containers by their paths."""
    if isinstance(item, torch.Tensor):
        found[path] = item
        return
    items = _items(item)
    if items or isinstance(item, (Mapping, list)):
        found[path] = item
    for key, child in items:
        _walk(child, (*path, key), found)


def _items(container: Any) -> list[tuple[Any, Any]]:
    if isinstance(container, Mapping):
        return list(container.items())
    if isinstance(container, (list, tuple)) and not isinstance(container, torch.Size):
        return list(enumerate(container))
    if dataclasses.is_dataclass(container) and not isinstance(container, type):
        return [(f.name, getattr(container, f.name, None)) for f in dataclasses.fields(container)]
    return []


def _same(one: list[tuple[Any, Any]], other: list[tuple[Any, Any]]) -> bool:
    return len(one) == len(other) and all(
        a == b and x is y for (a, x), (b, y) in zip(one, other, strict=True)
    )


def _fill(container: Any, content: list[tuple[Any, Any]]) -> None:
    if isinstance(container, MutableMapping):
        container.clear()
        container.update(content)
    elif isinstance(container, list):
        container[:] = [item for _, item in content]
    else:
        for name, item in content:
            object.__setattr__(container, name, item)
