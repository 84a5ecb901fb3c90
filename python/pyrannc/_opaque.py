"""Parts of a model that cannot be captured become one operator each.

A *site* is a submodule, or a custom `autograd.Function`, that the exporter cannot look into. The
model first runs for real at two batch sizes while the sites note the shapes of what they take and
give. During export each call of a site is a call of a registered operator that has these shapes
and no insides; afterwards it becomes a call of the real thing again (`Opaque`).
"""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ._arguments import Arguments
from ._dependence import Dependence
from ._sizes import Affine, fit
from ._strides import order_of
from ._structure import Structure, flatten
from .errors import CaptureError, ExecutionError
from .guards import lifted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

NAMESPACE = "pyrannc_opaque"
_NUMBERS = (torch.SymInt, torch.SymFloat, torch.SymBool)
_numbers = itertools.count()


class FlopCounter(TorchDispatchMode):
    """Counts floating-point operations.

    Attributes:
        total: operations so far.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Runs one operator."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        count = flop_registry.get(getattr(func, "_overloadpacket", None))
        if count is not None:
            self.total += int(count(*args, **kwargs, out_val=result))
        return result


class SavedStorages:
    """Counts the storages that autograd keeps, each once.

    Attributes:
        total: bytes so far.
    """

    def __init__(self, excluded: list[torch.Tensor]) -> None:
        self.total = 0
        # Holding the storages keeps their addresses from being used again.
        self._seen = {t.untyped_storage()._cdata: t.untyped_storage() for t in excluded}

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        """Takes note of a saved tensor."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen[storage._cdata] = storage
            self.total += storage.nbytes()
        return tensor


@dataclass(frozen=True, slots=True)
class Observation:
    """One call of a site in a real run.

    Attributes:
        rows: the batch size of the run.
        inputs: the tensors it took.
        arguments: the rest of what it took.
        outputs: the tensors it gave.
        results: the rest of what it gave.
        written: positions of the inputs, then of the state, that it wrote to.
        steady: those of them to which it wrote what did not depend on the inputs.
        flops: floating-point operations.
        saved_bytes: what autograd kept.
    """

    rows: int
    inputs: list[torch.Tensor]
    arguments: Structure
    outputs: list[torch.Tensor]
    results: Structure
    written: tuple[int, ...]
    steady: frozenset[int]
    flops: int
    saved_bytes: int


class UnclearSizesError(CaptureError):
    """Occurs when the sizes of what a part gives do not follow from the number of rows."""

    def __init__(self, site: Site) -> None:
        super().__init__(
            f"the sizes of what `{site.name}` gives depend on what its tensors hold",
            "pad what it gives to a size that does not depend on what tensors hold: "
            "`pad_packed_sequence` takes `total_length`, `bincount` takes `minlength`",
        )
        self.site = site


class Site:
    """A part of the model that is called as it is.

    Attributes:
        name: how it is called in the graph.
        function: the part itself.
        modules: the submodule, if it is one, and all inside it, by their paths.
        calls: its calls during the last export, by the name of their operator.
    """

    def __init__(
        self,
        name: str,
        function: Callable[..., Any],
        modules: Sequence[tuple[str, torch.nn.Module]] = (),
    ) -> None:
        self.name = name
        self.function = function
        self.modules = modules
        self.calls: dict[str, Opaque] = {}
        self._observed: dict[int, list[Observation]] = {}
        self._next_call = 0
        self._libraries: list[torch.library.Library] = []

    @property
    def module(self) -> torch.nn.Module | None:
        """The submodule, if it is one."""
        return self.modules[0][1] if self.modules else None

    @property
    def state(self) -> list[torch.Tensor]:
        """The parameters and buffers it reads; during export these are the exporter's."""
        if self.module is None:
            return []
        return [*self.module.parameters(), *self._buffers]

    @property
    def _buffers(self) -> list[torch.Tensor]:
        return [] if self.module is None else list(self.module.buffers())

    def _places(self) -> list[tuple[str, dict[str, Any], str, torch.Tensor]]:
        """Where modules have its buffers."""
        return [
            (path, module._buffers, name, buffer)
            for path, module in self.modules
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]

    def begin(self) -> None:
        """Starts another run or export."""
        self._next_call = 0
        self.calls.clear()
        self._libraries.clear()

    def observe(self, rows: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Calls the part for real and notes what it does."""
        tensors, _, arguments = flatten((args, kwargs))
        leaves = [tensor.detach().clone() for tensor in tensors]
        state = self.state
        before = [tensor.detach().clone() for tensor in self._buffers]
        places = {id(buffer): (registry, name) for _, registry, name, buffer in self._places()}
        with torch.enable_grad():
            given = [t.requires_grad_() if _differentiable(t) else t for t in leaves]
            given = [tensor.clone() for tensor in given]  # a part may write to what it is given
            watched = [*given, *state]
            versions = [tensor._version for tensor in watched]
            saved, flops = SavedStorages(state), FlopCounter()
            hooks = torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor)
            call_args, call_kwargs = arguments.build(given)
            passed = Arguments(call_args, call_kwargs)
            dependence = Dependence(given)
            with hooks, flops, dependence.followed():
                result = self.function(*call_args, **call_kwargs)
        if passed.changed:
            raise CaptureError(
                f"`{self.name}` cannot be captured, and changes a list or dictionary that it is "
                "given",
                hint="have it return what it puts there",
            )
        outputs, _, results = flatten(result, unknown=_nothing, root="result")
        first = len(watched) - len(before)
        held = [places[id(buffer)] for buffer in watched[first:]]
        now = [*watched[:first], *(registry[name] for registry, name in held)]
        replaced = {i for i, tensor in enumerate(watched) if now[i] is not tensor}
        # Running statistics change without another version.
        changed = {first + i for i, t in enumerate(now[first:]) if not _equal(t, before[i])}
        changed |= {i for i, t in enumerate(watched) if t._version != versions[i]}
        written = tuple(sorted(replaced | changed))
        uncertain = replaced if dependence.decided else set()
        steady = {i for i in written if i not in uncertain and not dependence.reaches(now[i])}
        self._observed.setdefault(rows, []).append(
            Observation(
                rows,
                leaves,
                arguments,
                outputs,
                results,
                written,
                frozenset(steady),
                flops.total,
                saved.total,
            )
        )
        return results.build([tensor.detach() for tensor in outputs])

    def skip(self) -> None:
        """Takes note of a call during export that needed no operator."""
        self._next_call += 1

    def forget(self, rows: int | None = None) -> None:
        """Forgets the run with that many rows, or all runs."""
        if rows is None:
            self._observed.clear()
        else:
            self._observed.pop(rows, None)

    @contextlib.contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Puts the state back as it was before the body."""
        state = self.state
        before = [tensor.detach().clone() for tensor in state]
        try:
            yield
        finally:
            with torch.no_grad():
                for tensor, value in zip(state, before, strict=True):
                    put_back(tensor, value)

    @contextlib.contextmanager
    def with_state(self, state: list[torch.Tensor], written: frozenset[int]) -> Iterator[None]:
        """Has the part use in the body what `state` has in place of its buffers.

        Args:
            state: what it uses.
            written: positions in it that the part is known to write to.

        Raises:
            ExecutionError: when it writes to others.
        """
        numbered = enumerate(zip(self.state, state, strict=True))
        given = {id(own): (index, tensor) for index, (own, tensor) in numbered}
        places = [
            (path, registry, name, buffer, *given[id(buffer)])
            for path, registry, name, buffer in self._places()
        ]
        versions = [tensor._version for *_, tensor in places]
        for _, registry, name, _, _, tensor in places:
            registry[name] = tensor
        strayed: list[str] = []
        try:
            yield
            for version, (path, registry, name, _, index, tensor) in zip(
                versions, places, strict=True
            ):
                assigned = registry.get(name)
                if index in written:
                    _copy_into(tensor, assigned, path, name)
                elif assigned is not tensor or tensor._version != version:
                    strayed.append(f"{path}.{name}" if path else name)
        finally:
            for _, registry, name, buffer, _, _ in places:
                registry[name] = buffer
        if strayed:
            raise _unforeseen(strayed[0])

    def trace(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Stands for the call during export.

        Raises:
            ValueError: when it is given a number that a tensor holds, or other tensors than in the
                real runs, so that the part around it has to be left whole.
        """
        if any(isinstance(leaf, _NUMBERS) for leaf in pytree.tree_leaves((args, kwargs))):
            raise ValueError(f"`{self.name}` is given a number that depends on a tensor")
        tensors, _, arguments = flatten((args, kwargs))
        runs = [calls[self._next_call] for calls in self._observed.values()]
        if any(len(run.inputs) != len(tensors) for run in runs):
            raise ValueError(f"`{self.name}` is given other tensors when it runs")
        self._next_call += 1
        call = Opaque(self, arguments, runs)
        name = f"call_{next(_numbers)}"
        self.calls[name] = call
        library = torch.library.Library(NAMESPACE, "FRAGMENT")
        self._libraries.append(library)
        library.define(f"{name}(Tensor[] inputs, Tensor[] state) -> Tensor[]")
        torch.library.register_fake(f"{NAMESPACE}::{name}", call.without_data, lib=library)
        operator = getattr(getattr(torch.ops, NAMESPACE), name)
        return runs[0].results.build(operator(tensors, self.state))


class Opaque(torch.nn.Module):
    """One call of a site, as an operator of the flat graph.

    Attributes:
        site: the part that is called.
        runs: what it did in real runs at one or two batch sizes.
        written: positions of the inputs, then of the state, that it writes to.
        steady: those of them to which it writes what does not depend on the inputs.
    """

    def __init__(self, site: Site, arguments: Structure, runs: list[Observation]) -> None:
        super().__init__()
        self.site = site
        self.runs = runs
        self.written = runs[0].written
        self.steady = runs[0].steady
        first = len(runs[0].inputs)
        self._state_written = frozenset(i - first for i in self.written if i >= first)
        self._arguments = arguments

    def forward(self, inputs: list[torch.Tensor], state: list[torch.Tensor]) -> list[torch.Tensor]:
        """Calls the real thing, with the buffers in `state`; parameters are what it holds."""
        args, kwargs = self._arguments.build(inputs)
        with lifted(), self.site.with_state(state, self._state_written):
            result = self.site.function(*args, **kwargs)
        outputs, _, _ = flatten(result, unknown=_nothing, root="result")
        self._check_sizes(inputs, outputs)
        return outputs

    def _check_sizes(self, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> None:
        """Refuses other sizes than capture has told: what follows may have made use of them."""
        if self.site.modules and not self.site.modules[0][0]:
            return  # it is the whole model, and nothing follows
        rows = self._rows(inputs)
        for index, output in enumerate(outputs):
            expected = [self._size(index, dim, rows) for dim in range(output.dim())]
            if list(output.shape) != expected:
                raise UnclearSizesError(self.site)

    def without_data(
        self, inputs: list[torch.Tensor], state: list[torch.Tensor]
    ) -> list[torch.Tensor]:
        """Tensors like the results."""
        rows = self._rows(inputs)
        gradient = any(tensor.requires_grad for tensor in (*inputs, *state))
        results = []
        for index, seen in enumerate(self.runs[0].outputs):
            shape = [self._size(index, dim, rows) for dim in range(seen.dim())]
            order = order_of(seen.shape, seen.stride())
            result = torch.empty_permuted(shape, order, dtype=seen.dtype, device=seen.device)
            if gradient and seen.requires_grad and torch.is_grad_enabled():
                result = result.requires_grad_().clone()
            results.append(result)
        return results

    @property
    def plain_arguments(self) -> str:
        """What it is given apart from tensors."""
        return self._arguments.describe(lambda _: "tensor")

    @property
    def flops(self) -> Affine:
        """Floating-point operations."""
        return self._line([run.flops for run in self.runs])

    @property
    def saved_bytes(self) -> Affine:
        """What autograd keeps."""
        return self._line([run.saved_bytes for run in self.runs])

    def forget(self) -> None:
        """Drops the tensors of the real runs."""
        self.runs.clear()

    def _line(self, measured: list[int]) -> Affine:
        if len(measured) < 2:
            return measured[0]
        return fit(measured[0], measured[1], (self.runs[0].rows, self.runs[1].rows))

    def _rows(self, inputs: list[torch.Tensor]) -> Any:
        """The batch size that the inputs' sizes tell."""
        if len(self.runs) == 1:
            return self.runs[0].rows
        first, second = self.runs
        for tensor, one, other in zip(inputs, first.inputs, second.inputs, strict=True):
            for dim, (before, after) in enumerate(zip(one.shape, other.shape, strict=True)):
                if before != after and before % first.rows == 0:
                    return tensor.shape[dim] // (before // first.rows)
        return first.rows

    def _size(self, index: int, dim: int, rows: Any) -> Any:
        sizes = [run.outputs[index].shape[dim] for run in self.runs]
        if len(set(sizes)) == 1:
            return sizes[0]
        growth, uneven = divmod(sizes[1] - sizes[0], self.runs[1].rows - self.runs[0].rows)
        if uneven:
            raise UnclearSizesError(self.site)
        return growth * rows + (sizes[0] - growth * self.runs[0].rows)


def _nothing(*_: Any) -> None:
    """Stands for what a part gives that is no tensor."""


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)


@torch.no_grad()
def _copy_into(tensor: torch.Tensor, assigned: torch.Tensor | None, path: str, name: str) -> None:
    """Writes what a part assigned to a buffer into what stands for it."""
    if assigned is tensor:
        return
    if assigned is None or assigned.shape != tensor.shape:
        found = "nothing" if assigned is None else f"shape {[*assigned.shape]}"
        raise ExecutionError(
            f"forward leaves {found} in the buffer `{path}.{name}`, which has the shape "
            f"{[*tensor.shape]}",
            hint="register it with the shape that it needs, and use parts of it",
        )
    tensor.copy_(assigned)


def _unforeseen(name: str) -> ExecutionError:
    return ExecutionError(
        f"a part of the model that cannot be captured wrote to the buffer `{name}`, which it did "
        "not do when the model was captured, so that nobody knows what the other parts of the "
        "batch do",
        hint="write to it in every call, for instance with `torch.where` or `torch.maximum`",
    )


def put_back(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """Gives a tensor the value and the shape that it had."""
    if tensor.shape == value.shape:
        tensor.copy_(value)
    else:
        tensor.data = value


def _differentiable(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()
