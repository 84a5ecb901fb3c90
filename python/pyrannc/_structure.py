"""Containers of tensors, taken apart into a list of tensors and put together again.

Arguments and results of a model are tuples, lists, dicts, dataclasses and mixtures of them, with
tensors and plain values at the leaves. A `Structure` remembers all of it but the tensors.
"""

from __future__ import annotations

import copy
import dataclasses
import enum
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeGuard

import numpy as np
import torch

from .errors import CaptureError


def is_number(value: object) -> TypeGuard[float]:
    """Whether this may be a number that changes from call to call; flags are none."""
    return type(value) in (int, float, np.float64)


Path: TypeAlias = tuple[Any, ...]
"""The way to something in a container: keys, names of fields and indices."""

CONSTANTS = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    range,
    slice,
    enum.Enum,
    type,
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
    torch.Size,
)


@dataclass(frozen=True, slots=True)
class Structure:
    """A container without its tensors.

    Attributes:
        kind: `tensor`, `constant`, `sequence`, `mapping` or `dataclass`.
        value: the tensor's index, the constant, or an example of the container without tensors.
        keys: the keys of a mapping or the fields of a dataclass.
        children: what the container holds.
    """

    kind: str
    value: Any
    keys: tuple[Any, ...] = ()
    children: tuple[Structure, ...] = ()

    def build(self, tensors: list[torch.Tensor] | tuple[torch.Tensor, ...]) -> Any:
        """The container with `tensors` in their places."""
        if self.kind == "tensor":
            return tensors[self.value]
        if self.kind == "constant":
            return self.value
        built = [child.build(tensors) for child in self.children]
        if self.kind == "sequence":
            return _build_sequence(self.value, built)
        if self.kind == "mapping":
            return _build_mapping(self.value, dict(zip(self.keys, built, strict=True)))
        filled = copy.copy(self.value)
        for name, item in zip(self.keys, built, strict=True):
            object.__setattr__(filled, name, item)
        return filled

    def paths(self) -> list[str]:
        """A name for each tensor, by its index: its path in the container."""
        found: dict[int, str] = {}

        def walk(part: Structure, path: tuple[str, ...]) -> None:
            if part.kind == "tensor":
                found[part.value] = ".".join(path)
            for name, child in part._items():
                walk(child, (*path, str(name)))

        walk(self, ())
        return [found[index] for index in range(len(found))]

    def constants(self) -> dict[Path, Any]:
        """The constants by the ways to them."""
        if self.kind == "constant":
            return {(): self.value}
        return {
            (name, *path): value
            for name, child in self._items()
            for path, value in child.constants().items()
        }

    def with_constants(self, values: Mapping[Path, Any]) -> Structure:
        """The same with other constants in some places."""
        if not values:
            return self
        if self.kind == "constant":
            return dataclasses.replace(self, value=values.get((), self.value))
        children = [
            child.with_constants({p[1:]: value for p, value in values.items() if p[:1] == (name,)})
            for name, child in self._items()
        ]
        return dataclasses.replace(self, children=tuple(children))

    def describe(self, leaf: Callable[[int], str], numbers: Collection[Path] = ()) -> str:
        """A text that is equal for equal structures; `leaf` describes the tensor of an index.

        Of numbers in some places only their type counts.
        """
        if self.kind == "tensor":
            return leaf(self.value)
        if self.kind == "constant":
            kind = type(self.value).__name__
            return (
                f"any {kind}"
                if () in numbers and is_number(self.value)
                else f"{kind}:{self.value!r}"
            )
        items = (
            f"{name!r}={child.describe(leaf, _below(name, numbers))}"
            for name, child in self._items()
        )
        return f"{type(self.value).__qualname__}({','.join(items)})"

    def _items(self) -> Iterator[tuple[Any, Structure]]:
        names = self.keys or range(len(self.children))
        return zip(names, self.children, strict=True)


def _below(name: Any, paths: Collection[Path]) -> list[Path]:
    """The rest of the ways that begin with a name."""
    return [path[1:] for path in paths if path[:1] == (name,)]


def flatten(
    tree: Any,
    *,
    unknown: Callable[[str, Any], Any] | None = None,
    root: str = "argument",
    symbols: bool = False,
) -> tuple[list[torch.Tensor], list[str], Structure]:
    """Takes a container apart.

    Args:
        tree: the container.
        unknown: gives what stands for an object of unknown type, by its path and itself; without
            it they are refused.
        root: what the container is called in messages.
        symbols: whether there may be symbols in it, as constants.

    Returns:
        The tensors, a name for each by its path in the container, and the rest.

    Raises:
        CaptureError: when an object may hide tensors where nobody looks.
    """
    tensors: list[torch.Tensor] = []
    names: list[str] = []

    def walk(item: Any, path: tuple[str, ...]) -> Structure:
        if isinstance(item, torch.Tensor):
            tensors.append(item)
            names.append(".".join(path))
            return Structure("tensor", len(tensors) - 1)
        if isinstance(item, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            if symbols:
                return Structure("constant", item)
            place = " ".join((root, *path))
            message = f"`{place}` is a number computed from the batch size"
            raise CaptureError(message, "let the model return tensors only")
        if isinstance(item, CONSTANTS) or callable(item):
            return Structure("constant", item)
        if isinstance(item, Mapping):
            children = tuple(walk(child, (*path, str(key))) for key, child in item.items())
            return Structure("mapping", _without_items(item), tuple(item), children)
        if isinstance(item, (list, tuple)):
            children = tuple(walk(child, (*path, str(i))) for i, child in enumerate(item))
            return Structure("sequence", _empty_sequence(item), (), children)
        if dataclasses.is_dataclass(item):
            fields = tuple(field.name for field in dataclasses.fields(item))
            children = tuple(walk(getattr(item, name), (*path, name)) for name in fields)
            example = copy.copy(item)
            for name in fields:
                object.__setattr__(example, name, None)
            return Structure("dataclass", example, fields, children)
        if unknown is not None:
            return Structure("constant", unknown(".".join(path), item))
        place = " ".join((root, *path))
        message = f"`{place}` is a `{type(item).__qualname__}`, which may hold tensors unseen"
        hint = "pass tensors in tuples, lists, dicts or dataclasses"
        raise CaptureError(message, hint)

    structure = walk(tree, ())
    return tensors, names, structure


class _Kind:
    """Stands for a container class whose instances cannot be made empty."""

    def __init__(self, made_by: type) -> None:
        self.made_by = made_by


def _without_items(mapping: Any) -> Any:
    if dataclasses.is_dataclass(mapping) or not hasattr(mapping, "clear"):
        return _Kind(type(mapping))
    empty = copy.copy(mapping)
    empty.clear()
    return empty


def _empty_sequence(sequence: list[Any] | tuple[Any, ...]) -> Any:
    if isinstance(sequence, tuple) and type(sequence) is not tuple:
        return _Kind(type(sequence))
    return type(sequence)()


def _build_sequence(example: Any, items: list[Any]) -> Any:
    if isinstance(example, _Kind):
        made_by = example.made_by
        return made_by(*items) if hasattr(made_by, "_fields") else made_by(items)
    if isinstance(example, list):
        filled = copy.copy(example)
        filled.extend(items)
        return filled
    return tuple(items)


def _build_mapping(example: Any, items: dict[Any, Any]) -> Any:
    if isinstance(example, _Kind):
        return example.made_by(**{str(key): item for key, item in items.items()})
    filled = copy.copy(example)
    filled.update(items)
    return filled
