"""Exports a model's forward as a program over a list of tensors."""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import fx

from ._autocast import no_autocast
from ._culprit import Caught, CustomBackward, Sites, Tracker, undisturbed
from ._exporter_call import exported
from ._flat import module_path
from ._flat_model import FlatModel
from ._left import Outcome, Results, Settling
from ._numbers import PinnedError, Symbolic, check_independent
from ._obstacles import DRAWS, SIZES, Obstacle, is_by_content, place_of, reason_of, unknown_numbers
from ._opaque import UnclearSizesError
from ._places import dotted, holder_of, num_items, put, replaced, value_at
from ._repeats import RealNeededError, traced_once
from ._side_effects import Left
from ._sizes import ROWS, Symbols, expression_text, number_name, size
from ._snapshot import Changes
from ._strides import order_of, ordered
from .errors import CaptureError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from ._arguments import ArgumentChanges
    from ._numbers import Number
    from ._opaque import Opaque
    from ._places import Place
    from ._structure import Structure


@dataclass(frozen=True, slots=True)
class Program:
    """An exported model.

    Attributes:
        module: the program.
        state: the parameters, buffers and constants that it reads as attributes but does not have.
        symbols: translates its sizes.
        rows: the number of rows it was exported with.
        batch_inputs: positions of the tensors that hold rows, and in which dimension.
        results: the structure of what the model returns.
        arguments: what a call changes in its arguments, made of its further results.
        opaque_calls: parts that are called as they are, by the name of their operator.
        static_reason: why the program is valid only for this number of rows, if it is.
        left: what a call leaves in attributes of modules.
        read: places in the user's objects that it has read.
        obstacles: what stopped the exporter in the parts that are called as they are.
        numbers: values of the numbers that are inputs of it, in the order of their symbols.
        guards: expressions of the numbers that are true where it is valid.
        stand_ins: expressions of numbers by the values that stand for them in the program.
        with_numbers: exports it once more, with some numbers as inputs.
    """

    module: fx.GraphModule
    state: dict[str, Any]
    symbols: Symbols
    rows: int
    batch_inputs: dict[int, int]
    results: Structure
    arguments: ArgumentChanges
    opaque_calls: dict[str, Opaque]
    static_reason: str | None
    left: Left
    read: frozenset[Place]
    obstacles: list[Obstacle]
    with_numbers: Callable[[Program, Mapping[Number, float]], Program]
    numbers: Mapping[Number, float] = field(default_factory=dict)
    guards: tuple[str, ...] = ()
    stand_ins: Mapping[float, sympy.Expr] = field(default_factory=dict)

    @property
    def names(self) -> dict[str, float]:
        """The values of its numbers by their names in expressions."""
        return {number_name(index): value for index, value in enumerate(self.numbers.values())}

    @property
    def dynamic(self) -> bool:
        """Whether its sizes are expressions of the number of rows."""
        return self.symbols.any


def export(
    model: torch.nn.Module,
    tensors: list[torch.Tensor],
    arguments: Structure,
    rows: int,
    static_reason: str | None = None,
    opaque: Iterable[str] = (),
    row_dims: Mapping[int, int] | None = None,
) -> Program:
    """Exports a model for tensors like these.

    Args:
        model: the model.
        tensors: the tensors among its arguments.
        arguments: the structure of its arguments.
        rows: the batch size; tensors with this first dimension hold rows, unless the model takes
            them otherwise.
        static_reason: why only this batch size should be tried, if so.
        opaque: submodules to be called as they are.
        row_dims: positions of the tensors that may hold rows, and in which dimension; those of
            other dimensions than the first do only where the model needs it.
    """
    flat = FlatModel(model, arguments)
    candidates = dict(row_dims_by_size(tensors, rows) if row_dims is None else row_dims)
    exporter = _Exporter(model, flat, candidates)
    for path in opaque:
        exporter.sites.add_module(model.get_submodule(path))
    if static_reason is None:
        # Sizes 0 and 1 are taken as constants by the exporter.
        module, state = exporter.export(tensors, max(rows, 2), dynamic=True)
        symbols = _batch_symbols(module, candidates)
        unrelated = _unrelated(symbols, candidates)
        if unrelated:
            others = {i: dim for i, dim in candidates.items() if i not in unrelated}
            return export(model, tensors, arguments, rows, None, opaque, others)
        static_reason = "the model is written for one batch size"
        if symbols:
            static_reason = _restriction(module, set(symbols.values()))
            table = Symbols(list(symbols.values()))
        if symbols and (static_reason is None or rows > 1):
            flat.tell()
            calls, exported_rows = exporter.sites.calls, max(rows, 2)
            return Program(
                module,
                state,
                table,
                exported_rows,
                {position: candidates[position] for position in symbols},
                flat.results,
                flat.arguments,
                calls,
                static_reason,
                exporter.left,
                flat.read,
                exporter.sites.obstacles,
                partial(exporter.with_numbers, tensors),
            )
    module, state = exporter.export(tensors, rows, dynamic=False)
    flat.tell()
    calls = exporter.sites.calls
    symbols_of_none = Symbols([])
    return Program(
        module,
        state,
        symbols_of_none,
        rows,
        {position: dim for position, dim in candidates.items() if dim == 0},
        flat.results,
        flat.arguments,
        calls,
        static_reason,
        exporter.left,
        flat.read,
        exporter.sites.obstacles,
        partial(exporter.with_numbers, tensors),
    )


class _Exporter:
    """Exports a model, again and again until nothing is left that stops the exporter.

    Attributes:
        sites: the parts that are called as they are.
        left: what a call leaves in attributes of modules.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        flat: FlatModel,
        candidates: dict[int, int],
    ) -> None:
        self.sites = Sites(model)
        self.left = self._left_by_sites = Left()
        self._seen = Changes()
        self._model = model
        self._flat = flat
        self._candidates = candidates

    def export(
        self, tensors: list[torch.Tensor], rows: int, *, dynamic: bool
    ) -> tuple[fx.GraphModule, dict[str, Any]]:
        """The exported program, and the state that it reads.

        Args:
            tensors: tensors like its arguments.
            rows: the batch size to export it with.
            dynamic: whether it should serve other batch sizes.
        """
        tracker = Tracker()

        def again() -> Outcome:
            traced = self._traced(tracker, self._copies(tensors, rows), candidates)
            return self._flat.changes, _text(*traced)

        candidates = self._candidates if dynamic else {}
        if self.sites:
            self._observe(tensors, rows)
        cause: Exception | None = None
        while True:
            try:
                copies = self._copies(tensors, rows)
                with unknown_numbers() as places:
                    module, state = self._traced(tracker, copies, candidates)
                drawing = self._drawing(tensors, rows, candidates) if tracker.drew else []
                unknown = _unknown_sizes(module, candidates)
                if not unknown and not drawing:
                    changes = self._flat.changes
                    self._check_strayed(changes)
                    self._check_outside(changes, lambda: self._ran(tensors, rows))
                    self.left = self._left_by_sites
                    if not changes.any:
                        return module, state
                    real = self._real(tensors, rows)
                    settling = Settling(self._model, changes, again, real, is_captured=True)
                    self.left = settling.left().with_part(self.left)
                    return self._traced(tracker, self._copies(tensors, rows), candidates)
                if unknown:
                    place = next(filter(None, places), "")
                    self.sites.add_module(self._around(unknown), SIZES, place)
                else:
                    self._leave_draws(drawing)
            except Exception as failure:
                self._blame(failure, tracker.running)
                cause = failure
            try:
                self._observe(tensors, rows)
            except CaptureError as refusal:
                raise refusal from cause

    def with_numbers(
        self, tensors: list[torch.Tensor], plain: Program, values: Mapping[Number, float]
    ) -> Program:
        """The program with numbers as inputs.

        Raises:
            PinnedError: when a number decides about sizes, or together with the batch size.
            Exception: whatever occurs when the model's code is given symbols.
        """
        symbolic = Symbolic(values)
        candidates = self._candidates if plain.dynamic else {}
        with self._flat.with_symbols(symbolic):
            copies = self._copies(tensors, plain.rows)
            module, state = self._traced(Tracker(), copies, candidates)
        found = _batch_symbols(module, candidates)
        batch, numbers = list(found.values()), symbolic.table
        if found.keys() != (plain.batch_inputs.keys() if plain.dynamic else set()) or set(batch) & {
            *numbers
        }:
            raise PinnedError(symbolic.names)
        symbols = Symbols(batch, numbers)
        check_independent(module, symbols)
        changed = self._flat.changes.values
        before = {place: value_at(self._model, place) for place in changed}
        pairs = zip(values, symbolic.symbols, strict=True)
        before |= {number.place: s for number, s in pairs if number.place is not None}
        return replace(
            plain,
            module=module,
            state=state,
            symbols=symbols,
            opaque_calls=self.sites.calls,
            left=plain.left.with_symbols(changed, symbols, before),
            numbers=values,
            guards=symbolic.guards(symbols),
            stand_ins={v: symbols.translated(e) for v, e in symbolic.stand_ins.items()},
        )

    def _traced(
        self, tracker: Tracker, tensors: list[torch.Tensor], candidates: dict[int, int]
    ) -> tuple[fx.GraphModule, dict[str, Any]]:
        """The program, with each distinct operator traced once if that works."""
        for views in (True, False):
            with contextlib.suppress(RealNeededError), traced_once(views=views) as repeats:
                try:
                    with self.sites.standing_in(tracker.running), tracker.watching():
                        return exported(self._flat, tensors, candidates)
                except Exception as failure:
                    known = isinstance(failure, Caught) or is_by_content(failure)
                    if known or not repeats.any or _known_cause(failure) is not None:
                        raise
                    raise RealNeededError from failure
        with self.sites.standing_in(tracker.running), tracker.watching():
            return exported(self._flat, tensors, candidates)

    def _copies(self, tensors: list[torch.Tensor], rows: int) -> list[torch.Tensor]:
        return [
            _copy(tensor, rows, self._candidates.get(index)) for index, tensor in enumerate(tensors)
        ]

    def _blame(self, failure: Exception, running: list[torch.nn.Module]) -> None:
        """Makes the part opaque in which the exporter failed; suspects others of its class."""
        self.sites.convict()
        if isinstance(failure, Caught):
            return
        cause = _known_cause(failure)
        if isinstance(cause, CustomBackward):
            self.sites.add_function(cause.function, place_of(cause))
            return
        if isinstance(cause, UnclearSizesError) and cause.site.module not in (None, self._model):
            self.sites.add_module(cause.site.module, SIZES)  # what is around it
            return
        if cause is not None:
            raise cause
        inside = self._own(running)
        reason, place = reason_of(failure), place_of(failure)
        culprit = self.sites.add_module(inside[-1] if inside else None, reason, place)
        if is_by_content(failure):
            self.sites.suspect(culprit)

    def _drawing(
        self, tensors: list[torch.Tensor], rows: int, candidates: dict[int, int]
    ) -> list[torch.nn.Module]:
        """The submodules that draw from Python's or NumPy's generator."""
        tracker = Tracker()
        tracker.drawing = []
        self._traced(tracker, self._copies(tensors, rows), candidates)
        return self._own(tracker.drawing)

    def _leave_draws(self, drawing: list[torch.nn.Module]) -> None:
        """Makes the parts opaque that draw numbers of which a graph would make constants."""
        inner = {part for module in drawing for part in module.modules() if part is not module}
        for module in dict.fromkeys(part for part in drawing if part not in inner):
            self.sites.add_module(module, DRAWS)

    def _check_strayed(self, captured: Changes) -> None:
        """Refuses parts that run as they are and change what other parts of the model hold.

        Args:
            captured: what those others change.
        """
        inside = self._seen.within(self.sites.paths).values
        for place in self._seen.values.keys() - self._seen.outside:
            if place not in inside and not captured.touch(place):
                raise CaptureError(
                    f"a part of the model that runs as it is changes `{dotted(place)}`, which is "
                    "not its own",
                    hint="change it in the forward of the module that holds it, or register it as "
                    "a buffer",
                )

    def _check_outside(self, captured: Changes, again: Callable[[], Changes]) -> None:
        """Refuses parts that run as they are and change what is outside of the model every time.

        What they change only once stays changed, as they may go on with it.

        Args:
            captured: what the other parts change.
            again: runs the model for real.
        """
        theirs = {
            place: value
            for place, value in self._seen.outside.items()
            if not captured.touch(place)
            or num_items(captured.values.get(place)) != num_items(value)
        }
        if not theirs:
            return
        with replaced(self._model, theirs):
            repeated = again()
        for place, value in theirs.items():
            if repeated.touch(place):
                raise CaptureError(
                    f"a part of the model that runs as it is changes `{dotted(place)}`, which is "
                    "no part of the model: every microbatch would change it",
                    hint="keep it in an attribute of the model, or have forward return it",
                )
            put(holder_of(self._model, place), place[-1], value)
            del self._seen.values[place]

    def _own(self, modules: Iterable[torch.nn.Module]) -> list[torch.nn.Module]:
        """Those which belong to the model."""
        own = set(self._model.modules())
        return [module for module in modules if module in own]

    def _ran(self, tensors: list[torch.Tensor], rows: int) -> Changes:
        """What the model changes as it is."""
        with undisturbed(self._model), no_autocast():
            self._flat.forward(*self._copies(tensors, rows))
        return self._flat.changes

    def _real(self, tensors: list[torch.Tensor], rows: int) -> Callable[[], Outcome] | None:
        """Runs the model as it is, if it is not a model without data."""
        if any(tensor.is_meta for tensor in [*self._model.parameters(), *self._model.buffers()]):
            return None

        def run() -> Outcome:
            with undisturbed(self._model), no_autocast():
                results = Results(self._flat.forward(*self._copies(tensors, rows)))
            return self._flat.changes, results

        return run

    def _around(self, paths: list[str]) -> torch.nn.Module:
        """The smallest submodule that holds all of the given ones."""
        common = paths[0].split(".") if paths[0] else []
        for path in paths[1:]:
            parts = path.split(".") if path else []
            same = [a == b for a, b in zip(common, parts, strict=False)]
            common = common[: same.index(False) if False in same else len(same)]
        return self._model.get_submodule(".".join(common))

    def _observe(self, tensors: list[torch.Tensor], rows: int) -> None:
        """Runs the model for real, so that the sites see what they are given, and settles them."""
        other = max(2, rows // 2) if rows >= 4 else 2 * rows
        seen: dict[int, Changes] = {}

        results: dict[int, Results] = {}

        def run(count: int) -> None:
            results[count] = Results(self._flat.forward(*self._copies(tensors, count)))
            self._seen = self._flat.changes
            seen[count] = self._seen.within(self.sites.paths)

        def again() -> Outcome:
            self.sites.observe(run, (rows,))
            return seen[rows], results[rows]

        with no_autocast():
            self.sites.observe(run, (rows, other))
            self._left_by_sites = Left()
            if seen[rows].any:
                settling = Settling(self._model, seen[rows], again, again, is_captured=False)
                self._left_by_sites = settling.left()
                self.sites.observe(run, (rows, other))


def _known_cause(failure: BaseException | None) -> CaptureError | CustomBackward | None:
    """The error of our own that the exporter wrapped, if it is one."""
    while failure is not None:
        if isinstance(failure, (CaptureError, CustomBackward)):
            return failure
        failure = failure.__cause__ or failure.__context__
    return None


def _unknown_sizes(module: fx.GraphModule, candidates: Mapping[int, int]) -> list[str]:
    """Paths of the submodules that make tensors whose sizes depend on what tensors hold."""
    symbols = set(_batch_symbols(module, candidates).values())
    paths: list[str] = []
    for node in module.graph.nodes:
        value = node.meta.get("val")
        if _is_sized_by_content(node):
            # Though the exporter may take a size that it does not know for the only fitting one.
            paths.append(module_path(node, "model."))
            continue
        sizes: list[Any] = [size for t in _tensors(value) for size in t.shape]
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            sizes.append(value)
        for item in sizes:
            if isinstance(item, int | float | bool):
                continue
            if item.node.expr.free_symbols - symbols:
                paths.append(module_path(node, "model."))
                break
    return paths


def _is_sized_by_content(node: fx.Node) -> bool:
    """Whether an operator makes as many entries as some tensor's content says."""
    if torch.Tag.dynamic_output_shape not in getattr(node.target, "tags", ()):
        return False
    if node.target is torch.ops.aten.index.Tensor:  # by masks, but not by numbers
        found = [given.meta["val"] for given in node.all_input_nodes[1:]]
        return any(index.dtype in (torch.bool, torch.uint8) for index in _tensors(found))
    return node.kwargs.get("output_size") is None


def _tensors(value: Any) -> list[torch.Tensor]:
    items = value if isinstance(value, (tuple, list)) else [value]
    return [item for item in items if isinstance(item, torch.Tensor)]


def _copy(tensor: torch.Tensor, rows: int, dim: int | None) -> torch.Tensor:
    """A tensor of its own, with so many rows in a dimension.

    The exporter takes one tensor given twice for one argument.
    """
    copied = tensor.detach().clone()
    if dim is not None:
        copied = repeated(copied, dim, rows)
    return copied.requires_grad_(tensor.requires_grad)


def repeated(tensor: torch.Tensor, dim: int, rows: int) -> torch.Tensor:
    """The tensor with so many rows in a dimension, of whatever content."""
    held = tensor.shape[dim]
    if held == rows:
        return tensor
    longer = tensor.index_select(dim, torch.arange(rows, device=tensor.device) % held)
    return ordered(longer, order_of(tensor.shape, tensor.stride()))


def row_dims_by_size(tensors: list[torch.Tensor], rows: int) -> dict[int, int]:
    """By position, the dimension of each tensor that is as long as the batch; the first if it is.

    In an LSTM's state that is the second.
    """
    found = {}
    for position, tensor in enumerate(tensors):
        dims = [dim for dim, length in enumerate(tensor.shape) if length == rows]
        if dims and (dims[0] == 0 or rows > 1):
            found[position] = dims[0]
    return found


def _text(module: fx.GraphModule, state: dict[str, Any]) -> str:
    """A text that is equal for programs that compute the same, in the same order."""
    lines = [f"{node.name} {node.op} {node.target} {node.args}" for node in module.graph.nodes]
    lines += [f"{node.kwargs}" for node in module.graph.nodes if node.kwargs]
    constants = {**module.__dict__, **state}
    lines += [
        f"{name} {value.tolist()}"
        for name, value in constants.items()
        if isinstance(value, torch.Tensor) and name.rpartition(".")[2].startswith("lifted_tensor")
    ]
    return re.sub(r"call_\d+", "call", "\n".join(lines))  # of opaque parts: other ones every time


def _batch_symbols(
    module: fx.GraphModule, candidates: Mapping[int, int]
) -> dict[int, sympy.Symbol]:
    """The symbols of the dimensions that may hold rows, by the position of the tensor."""
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    found = {}
    for index, dim in candidates.items():
        length = placeholders[index].meta["val"].shape[dim]
        if isinstance(length, torch.SymInt):
            expression = length.node.expr
            # The exporter may have found out meanwhile that it is a constant.
            if isinstance(expression, sympy.Symbol):
                found[index] = expression
    return found


def _unrelated(symbols: dict[int, sympy.Symbol], candidates: Mapping[int, int]) -> set[int]:
    """The tensors whose dimension, not the first, is as long as the batch only by chance."""
    known = {symbol for index, symbol in symbols.items() if candidates[index] == 0}
    known.update(list(symbols.values())[:1])
    return {i for i, symbol in symbols.items() if symbol not in known}


def _restriction(module: fx.GraphModule, symbols: set[sympy.Symbol]) -> str | None:
    """Why the program serves only some batch sizes: the model decided something by the size."""
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    environment = placeholders[0].meta["val"].fake_mode.shape_env
    for guard in environment.guards:
        expression = guard.expr.xreplace(dict.fromkeys(guard.expr.free_symbols, ROWS))
        if not guard.expr.free_symbols & symbols or expression in (True, sympy.true):
            continue
        text = expression_text(expression)
        if not all(size(rows, text) for rows in range(2, 130)):
            return f"the model decides by the batch size: `{text}`"
    return None
