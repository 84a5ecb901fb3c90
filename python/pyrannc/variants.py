"""The forms in which a deployed model was captured: one for each mode and kind of input.

What a model runs depends on the mode of each of its modules, on which parameters are trained, and
on the form of its arguments. Each combination is captured when it first occurs and kept; the plan
is the same for all of them. So `train()`, `eval()` and other sequence lengths cost a capture the
first time and nothing afterwards.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Generic, TypeVar

from ._reach import reach

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import torch

    from . import _core
    from ._numbers import Number
    from .accumulation import Reduction
    from .buffers import Announcement
    from .capture import Captured
    from .executor import Executor

logger = logging.getLogger(__name__)

MOST_VARIANTS = 64
"""How many are kept: the ones used last."""
_MOST_PROGRAMS = 64

Key = TypeVar("Key")
Item = TypeVar("Item")


class Recent(Generic[Key, Item]):
    """A dictionary of the items used last.

    Attributes:
        most: how many it keeps.
        forgotten: how many it did not.
    """

    def __init__(self, most: int) -> None:
        """Starts empty."""
        self.most = most
        self.forgotten = 0
        self._items: OrderedDict[Key, Item] = OrderedDict()

    def get(self, key: Key) -> Item | None:
        """The item, which is now the one used last."""
        if key in self._items:
            self._items.move_to_end(key)
        return self._items.get(key)

    def put(self, key: Key, item: Item) -> None:
        """Adds an item, and forgets the one that was not used for longest if there are too many."""
        self._items[key] = item
        self._items.move_to_end(key)
        if len(self._items) > self.most:
            self._items.popitem(last=False)
            self.forgotten += 1

    def items(self) -> list[tuple[Key, Item]]:
        """All items, the one used last at the end."""
        return list(self._items.items())

    def clear(self) -> None:
        """Forgets all items."""
        self._items.clear()


@dataclass(frozen=True, slots=True)
class Mode:
    """What of a model, apart from its arguments, decides which operators it runs.

    Attributes:
        training: for each module whether it is in training mode, in the order of `modules()`.
        trained: for each parameter whether it requires gradients, in the order of `parameters()`.
        dropout: whether dropout is on; `None` as the modules say.
        form: what else of its modules counts, see `_form`; on all processes together, once these
            have told each other.
    """

    training: bytes
    trained: bytes
    dropout: bool | None = None
    form: int = 0

    @classmethod
    def of(cls, model: torch.nn.Module, dropout: bool | None = None, form: int = 0) -> Mode:  # noqa: FBT001
        """The mode that `model` is in."""
        return cls(
            bytes(module.training for module in model.modules()),
            bytes(parameter.requires_grad for parameter in model.parameters()),
            dropout,
            form,
        )

    @property
    def digest(self) -> int:
        """A number that is equal on two processes where the modes are, apart from the form."""
        text = repr((self.training, self.trained, self.dropout)).encode()
        return int.from_bytes(hashlib.sha256(text).digest()[:7], "big")

    def together(self, forms: Sequence[int]) -> Mode:
        """The mode of a model that has these forms on the processes, by rank.

        They may differ where that changes nothing that is computed, so the forms of all say which
        capture serves: on all processes the same one.
        """
        if len(set(forms)) == 1:
            return replace(self, form=forms[0])
        number = hashlib.sha256(repr(tuple(forms)).encode()).digest()[:7]
        return replace(self, form=int.from_bytes(number, "big"))

    def describe(self, model: torch.nn.Module) -> str:
        """In words, for a message."""
        main = bool(self.training[0])
        named = [name for name, _ in model.named_modules()]
        others = [name for name, mode in zip(named, self.training, strict=True) if mode != main]
        frozen = [
            name
            for (name, _), trained in zip(model.named_parameters(), self.trained, strict=True)
            if not trained
        ]
        words = ["train mode" if main else "eval mode"]
        if others:
            words.append(f"{'eval' if main else 'train'} mode for {_some(others)}")
        if frozen:
            words.append(f"{_some(frozen)} frozen")
        if self.dropout is not None:
            words.append(f"dropout {'on' if self.dropout else 'off'}")
        return ", ".join(words)


def _some(names: list[str], most: int = 3) -> str:
    shown = ", ".join(f"`{name}`" for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


@dataclass
class Variant:
    """The model as captured for one mode and one kind of input, laid out by the plan.

    Attributes:
        captured: the model as a graph.
        graph: what the planner knows of it.
        placement: the plan applied to it.
        executor: runs this rank's part.
        reduction: adds up gradients that accumulated.
        talking: the stages whose replicas talk while they compute.
        announcement: of buffers, after a step.
        companions: by a program's identity the program, and who runs what together in it.
        has_half: whether it computes in float16, where gradients that are not scaled vanish.
    """

    captured: Captured
    graph: _core.Graph
    placement: _core.Placement
    executor: Executor
    reduction: Reduction
    talking: frozenset[int]
    announcement: Announcement
    companions: Recent[int, tuple[_core.Program, dict[tuple[int, int], list[int]]]] = field(
        default_factory=lambda: Recent(_MOST_PROGRAMS)
    )
    has_half: bool = field(init=False)
    _programs: Recent[tuple[tuple[int, ...], bool, bool, bool, bool], _core.Program] = field(
        default_factory=lambda: Recent(_MOST_PROGRAMS)
    )

    def __post_init__(self) -> None:
        """Looks at the types once."""
        self.has_half = any(value.dtype == "float16" for value in self.executor.values)

    @cached_property
    def reached(self) -> dict[int, frozenset[str]]:
        """By differentiable output the names of the parameters that get a gradient from it."""
        return reach(self.captured, self.graph)

    def program(
        self, rows: tuple[int, ...], *, gather: bool, training: bool, reduce: bool, seeded: bool
    ) -> _core.Program:
        """What each rank does with so many rows of each rank."""
        key = (rows, gather, training, reduce, seeded)
        program = self._programs.get(key)
        if program is None:
            program = self.placement.program(
                list(rows), gather=gather, training=training, reduce=reduce, seeded=seeded
            )
            self._programs.put(key, program)
        return program


@dataclass(frozen=True, slots=True)
class Kind:
    """What a variant serves.

    Attributes:
        signature: of the arguments.
        mode: of the model.
        rows: of the global batch, for a variant that serves only this number of them.
        guards: what is true of the numbers that it is given.
    """

    signature: str
    mode: Mode
    rows: int | None = None
    guards: tuple[str, ...] = ()


class Variants:
    """The variants used last. All ranks ask for the same ones, so all forget the same ones."""

    def __init__(self) -> None:
        """Starts empty."""
        self._recent: Recent[Kind, Variant] = Recent(MOST_VARIANTS)
        self._row_inputs: Recent[tuple[str, Mode], frozenset[int]] = Recent(MOST_VARIANTS)

    def find(
        self, kind: Kind, rows: int, numbers: Mapping[Number, float], *, with_gradients: bool
    ) -> Variant | None:
        """The variant for such a call with so many rows and such numbers.

        Without gradients it does not matter which parameters are trained.
        """
        for wanted in (kind, replace(kind, rows=rows)):
            fitting = [
                known
                for known, variant in self._recent.items()
                if _forward_alike(known, wanted) and variant.captured.serves(numbers)
            ]
            exact = [known for known in fitting if known.mode == wanted.mode]
            if exact or (fitting and not with_gradients):
                return self._recent.get((exact or fitting)[-1])
        return None

    def add(self, kind: Kind, variant: Variant) -> None:
        """Keeps a variant."""
        captured = variant.captured
        holding = frozenset(captured.batch_inputs)
        self._row_inputs.put((kind.signature, replace(kind.mode, form=0)), holding)
        kind = replace(kind, rows=captured.static_rows, guards=captured.guards)
        self._recent.put(kind, variant)
        if self._recent.forgotten == 1:
            logger.warning(
                "the model was called in more than %d different ways (lengths, types, modes); each "
                "is captured when it comes up and the one used longest ago is forgotten: pad "
                "sequences to a few lengths to save the time of capturing",
                self._recent.most,
            )

    def row_inputs(self, signature: str, mode: Mode) -> frozenset[int] | None:
        """Positions of the tensors that hold rows in such a call, once it was captured.

        The same on all processes, also where the forms of their models differ.
        """
        return self._row_inputs.get((signature, replace(mode, form=0)))

    def runs_submodules(self) -> bool:
        """Whether one has parts that could not be captured."""
        return any(variant.captured.runs_submodules for _, variant in self._recent.items())

    def clear(self) -> None:
        """Forgets all."""
        self._recent.clear()


def _forward_alike(first: Kind, second: Kind) -> bool:
    return replace(first.mode, trained=b"") == replace(second.mode, trained=b"") and (
        first.signature == second.signature and first.rows == second.rows
    )


def holders_beyond(
    needed: Mapping[str, list[int]], held: Mapping[str, list[int]]
) -> dict[str, list[int]]:
    """By name, the ranks that need a tensor which they do not hold."""
    beyond = {
        name: sorted(set(ranks) - set(held[name])) for name, ranks in needed.items() if name in held
    }
    return {name: ranks for name, ranks in beyond.items() if ranks}


@contextlib.contextmanager
def in_mode(model: torch.nn.Module, *, training: bool) -> Iterator[None]:
    """Puts every module into one mode and gives each its own back."""
    modes = {module: module.training for module in model.modules()}
    if modes[model] == training:
        yield
        return
    model.train(training)
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
