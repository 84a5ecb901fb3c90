"""Follows what is computed from some tensors, to see whether anything else depends on them.

What is written after Python has looked at one of the numbers counts as dependent, too: nobody knows
what another number would have led to.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_READS = ("numpy", "tolist", "__array__", "__dlpack__", "data_ptr")


class Dependence:
    """What depends on some tensors.

    Attributes:
        decided: whether Python has looked at one of their numbers.
    """

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        """Starts from the tensors."""
        self.decided = False
        # Weak references keep the addresses of storages from being used again.
        self._storages: dict[int, StorageWeakRef] = {}
        self._add(tensors)

    @contextlib.contextmanager
    def followed(self) -> Iterator[None]:
        """Follows the operators that the body calls."""
        with _Reads(self), _Operators(self):
            yield

    def reaches(self, tensor: torch.Tensor) -> bool:
        """Whether what is in a tensor may depend on them."""
        return tensor.untyped_storage()._cdata in self._storages

    def note(self, arguments: Any, written: Any, results: Any, *, is_read: bool) -> None:
        """Takes note of one operator.

        Args:
            arguments: what it was given.
            written: those of its arguments that it may have written to.
            results: what it gave.
            is_read: whether the content of its arguments is known to Python afterwards.
        """
        depends = any(map(self.reaches, _tensors(arguments)))
        if depends:
            self._add(_tensors((written, results)))
        elif self.decided:  # a view of what does not depend on them does not, either
            viewed = {tensor.untyped_storage()._cdata for tensor in _tensors(arguments)}
            new = [t for t in _tensors(results) if t.untyped_storage()._cdata not in viewed]
            self._add([*_tensors(written), *new])
        self.decided |= depends and is_read

    def _add(self, tensors: Iterable[torch.Tensor]) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._storages:
                self._storages[storage._cdata] = StorageWeakRef(storage)


class _Operators(TorchDispatchMode):
    """Tells of operators."""

    def __init__(self, dependence: Dependence) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._dependence = dependence

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Runs one operator."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        written = (args, kwargs) if func._schema.is_mutable else ()
        numbers = [leaf for leaf in pytree.tree_leaves(result) if not _is_tensor(leaf)]
        has_numbers = any(number is not None for number in numbers)
        is_read = has_numbers or torch.Tag.dynamic_output_shape in func.tags
        self._dependence.note((args, kwargs), written, result, is_read=is_read)
        return result


class _Reads(TorchFunctionMode):
    """Tells of what leaves PyTorch without any operator."""

    def __init__(self, dependence: Dependence) -> None:
        super().__init__()
        self._dependence = dependence

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Runs one function."""
        if getattr(func, "__name__", "") in _READS:
            self._dependence.note(args, (), (), is_read=True)
        return func(*args, **(kwargs or {}))


def _tensors(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(values) if _is_tensor(leaf)]


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)
