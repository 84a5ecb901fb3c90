"""Builds the part of a captured model that one stage runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ._cut import Part, cut
from ._opaque import Opaque
from ._side_effects import Rewinding
from .batch_norm import norms_of
from .errors import CaptureError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from . import _core
    from .batch_norm import PartNorm
    from .capture import Captured


class StageModule:
    """Some operators of a model as a function of the values they need.

    Attributes:
        inputs: ids of the values it needs.
        outputs: ids of the values it gives.
        parameters: the user's own parameters that it uses, by qualified name.
        buffers: the buffers that it uses, and tensors that capture found in the model's code.
        written: those of the buffers that it writes to.
        norms: its batch norms that see parts of the batch.
        whole: submodules that run as they are, each with all inside it, by their paths.
        module: the operators.
    """

    def __init__(self, inputs: list[int], outputs: list[int], part: Part) -> None:
        self.inputs = inputs
        self.outputs = outputs
        self.module = part.module
        self.parameters: dict[str, torch.nn.Parameter] = {}
        self.buffers: dict[str, torch.Tensor] = {}
        self.written: dict[str, torch.Tensor] = {}
        self.norms = norms_of(part.module)
        self.whole = [
            operator.site.modules
            for operator in part.module.modules()
            if isinstance(operator, Opaque)
        ]
        self._extras = part.extras
        self._denominator_dtypes = part.denominator_dtypes

    def __call__(
        self,
        values: dict[int, torch.Tensor],
        rows: int,
        row_share: float = 1.0,
        denominators: Sequence[torch.Tensor] = (),
        written: Mapping[str, torch.Tensor] | None = None,
        numbers: Mapping[str, float] | None = None,
    ) -> dict[int, torch.Tensor]:
        """Runs the operators.

        Args:
            values: the inputs by value id; not kept.
            rows: how many rows of the batch they hold.
            row_share: the part of the whole batch which that is.
            denominators: the whole batch's denominators, see `Captured.denominators`.
            written: what to write to in place of the buffers of these names, by default the
                buffers themselves.
            numbers: of the call, see `Captured.named_numbers`.
        """
        given_numbers = numbers or {}
        extras: list[object] = []
        for name in self._extras:
            if name == "rows":
                extras.append(rows)
            elif name == "row_share":
                extras.append(row_share)
            elif name in given_numbers:
                extras.append(given_numbers[name])
            else:
                given = denominators[int(name.removeprefix("denominator_"))]
                extras.append(given.to(self._denominator_dtypes[name]))
        targets = self.written if written is None else written
        results = self.module(*(values[i] for i in self.inputs), *extras, *targets.values())
        return dict(zip(self.outputs, results, strict=True))


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of the model as units that run one after the other.

    Attributes:
        inputs: ids of the values it needs.
        outputs: ids of the values it gives.
        units: its parts, each with values that the others give.
        needed: for each unit, ids of the values that are still needed after it.
        rewinding: of attributes that its parts change.
    """

    inputs: list[int]
    outputs: list[int]
    units: list[StageModule]
    needed: list[set[int]]
    rewinding: Rewinding

    @classmethod
    def build(cls, captured: Captured, placed: _core.PlacedStage) -> Stage:
        """The stage of a placement."""
        units = []
        for unit in placed.units:
            inside = set(unit.nodes)
            groups = [group for group in placed.recompute if inside.issuperset(group)]
            units.append(build_stage(captured, unit.nodes, unit.inputs, unit.outputs, groups))
        needed = [set(placed.outputs)]
        for module in reversed(units[1:]):
            needed.append(needed[-1].union(module.inputs))
        rewinding = Rewinding([part for unit in units for part in unit.whole], captured.left)
        return cls(placed.inputs, placed.outputs, units, needed[::-1], rewinding)

    @property
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """The user's own parameters that it uses, by qualified name."""
        return {name: p for unit in self.units for name, p in unit.parameters.items()}

    @property
    def written(self) -> dict[str, torch.Tensor]:
        """Those of the buffers that it writes to."""
        return {name: b for unit in self.units for name, b in unit.written.items()}

    @property
    def norms(self) -> list[PartNorm]:
        """Its batch norms that see parts of the batch."""
        return [norm for unit in self.units for norm in unit.norms]


def build_stage(
    captured: Captured,
    node_keys: Sequence[str],
    inputs: Sequence[int],
    outputs: Sequence[int],
    recompute: Sequence[Sequence[str]] = (),
) -> StageModule:
    """The stage that runs the operators with the given keys.

    Args:
        captured: the model.
        node_keys: keys of the stage's operators, in the order in which they run.
        inputs: ids of the values that it is given.
        outputs: ids of the values that it gives.
        recompute: keys of operators, each group together in `node_keys`, whose inner values are
            not kept for the backward but computed again in it.

    Raises:
        CaptureError: when an operator needs a value that the stage neither has nor is given.
    """
    unknown = [key for key in node_keys if key not in captured.node_by_key]
    if unknown:
        message = f"the captured model has no operator `{unknown[0]}`"
        raise CaptureError(message, "the plan was made for another model; plan again")
    nodes = captured.value_nodes
    part = cut(
        captured.module,
        [nodes[value] for value in inputs],
        [nodes[value] for value in outputs],
        only=[captured.node_by_key[key] for key in node_keys],
        recompute=[[captured.node_by_key[key] for key in group] for group in recompute],
        name="Stage",
    )
    stage = StageModule(list(inputs), list(outputs), part)
    for name in part.state:
        tensor = captured.state[name]
        if isinstance(tensor, torch.nn.Parameter):
            stage.parameters[name] = tensor
        else:
            stage.buffers[name] = tensor
    stage.written = {name: stage.buffers[name] for name in part.written}
    for norm in stage.norms:
        norm.seen = None  # a profile may have run it
    return stage
