"""The user's optimizer as a whole: the state that all ranks keep, as the bare optimizer has it.

After deployment an optimizer keeps this rank's parameters only. It stays the user's object; four of
its methods are replaced on the object itself, so that a pickled or copied optimizer is a plain one:
``state_dict(from_global=True)`` and ``load_state_dict(..., from_global=True)`` speak of all
parameters in the order in which the user gave them, and ``add_param_group`` takes parameters of any
rank. A whole state therefore goes from and to a plain optimizer of the bare model.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ._optimizer_entries import (
    Announced,
    Group,
    Kind,
    announce,
    group_of,
    keeps_alike,
    only,
    options_of,
    suits,
)
from .comm import get_rank
from .errors import MismatchError, RaNNCError
from .meeting import digest, from_rank_zero, meet, raise_together
from .optimizer import foreign_parameters, keep_local, state_part
from .remote import RemoteParameter

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from .comm import Communicator
    from .state import Division, Holders


_WHOLE_HINT = (
    "load the state of an optimizer that was built in the same way, of which "
    "`state_dict(from_global=True)` gives the whole; what `state_dict()` gives is this process's "
    "own, for the same wrapped model"
)


@dataclass(frozen=True, slots=True)
class _Model:
    """One deployed model whose parameters the optimizer trains."""

    holders: Holders
    names: dict[torch.Tensor, str]


class WholeOptimizer:
    """What the optimizers of all ranks are together.

    Attributes:
        optimizer: the user's, with this rank's parameters.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        """Replaces the methods of ``optimizer``; see :meth:`of`."""
        self.optimizer = optimizer
        self._names: dict[torch.Tensor, str] = {}
        self._groups: list[Group] | None = None  # as before deployment; none: as they are
        self._models: list[_Model] = []
        self._plain_state_dict = optimizer.state_dict
        self._plain_load_state_dict = optimizer.load_state_dict
        self._plain_add_param_group = optimizer.add_param_group
        self._plain_zero_grad = optimizer.zero_grad
        self._said_partial = False
        self._awaits_options = False
        for name in ("state_dict", "load_state_dict", "add_param_group", "zero_grad"):
            setattr(optimizer, name, getattr(self, name))

    @classmethod
    def of(
        cls, optimizer: torch.optim.Optimizer, names: Mapping[str, torch.nn.Parameter]
    ) -> WholeOptimizer:
        """The one of this optimizer; several models may share an optimizer.

        Args:
            optimizer: the user's.
            names: the parameters of a model that it trains, by name.
        """
        known = getattr(optimizer.state_dict, "__self__", None)
        whole = known if isinstance(known, WholeOptimizer) else cls(optimizer)
        whole._names.update({parameter: name for name, parameter in names.items()})
        return whole

    # ---- What users call on the optimizer

    def state_dict(self, *args: Any, from_global: bool = False, **kwargs: Any) -> dict[str, Any]:
        """The optimizer's state.

        Args:
            *args: as the optimizer's class takes them.
            from_global: all of it, as the bare model's optimizer would have it: full tensors on the
                CPU on rank 0, an empty dictionary on the others. Collective. Before the first call
                of the model, and without ``from_global``: what this process has.
            **kwargs: as the optimizer's class takes them.
        """
        if not from_global or self._groups is None:
            self._say_partial()
            return self._plain_state_dict(*args, **kwargs)
        comm, _ = self._meet("optimizer.state_dict(from_global=True)")
        with comm.guard("gathering the optimizer's state"):
            whole = self._gather(comm)
        if comm.rank != 0:
            return {}
        return self._as_whole(whole, args, kwargs)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], *args: Any, from_global: bool = False, **kwargs: Any
    ) -> None:
        """Takes a state.

        Args:
            state_dict: that of all parameters, on every process or on rank 0, with an empty one on
                the others; or what :meth:`state_dict` gave this process. After the first call of
                the model collective; before it, what rank 0 has at the first call counts.
            *args: as the optimizer's class takes them.
            from_global: ``True`` to take no other state than that of all parameters.
            **kwargs: as the optimizer's class takes them.

        Raises:
            RaNNCError: when the state is not one for these parameters; nothing is changed then.
        """
        if self._models or (from_global and self._groups is not None):
            state_dict, whole = self._agreed(state_dict, from_global=from_global)
        else:
            whole = self._groups is None
            if whole and not state_dict and get_rank() != 0:
                self._awaits_options = True  # rank 0's state counts at the first call
                return
            if whole and (problem := self._problem(state_dict)) is not None:
                raise problem
        given = self._local(state_dict) if whole else dict(state_dict)
        self._plain_load_state_dict(given, *args, **kwargs)

    def zero_grad(self, set_to_none: bool = True) -> None:  # noqa: FBT001 - torch's signature
        """As in ``torch.optim``, also for what other processes train."""
        self._plain_zero_grad(set_to_none)
        for parameter in self._parameters() if set_to_none else ():
            if isinstance(parameter, RemoteParameter):
                parameter.grad = None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters of any rank; every process must give the same ones. Collective.

        Raises:
            RaNNCError: when the processes give different parameters, or one that it has already.
        """
        if self._groups is None:
            self._plain_add_param_group(param_group)
            return
        group = group_of(param_group)
        comm, _ = self._meet("optimizer.add_param_group(...)")
        told = comm.all_gather_objects([self._label(p) for p in group.parameters])
        raise_together(comm, self._problem_to_add(group, told))
        kept = [self._is_here(parameter) for parameter in group.parameters]
        local = {**param_group, "params": only(group.parameters, kept)}
        if group.names is not None:
            local["param_names"] = only(group.names, kept)
        self._plain_add_param_group(local)
        self._groups.append(group)

    # ---- What deployment calls

    def deploy(self, holders: Holders, names: Mapping[str, torch.nn.Parameter]) -> None:
        """Leaves to this rank its parameters of one model, with rank 0's state. Collective.

        Args:
            holders: who holds the model's parameters.
            names: the model's parameters by name.
        """
        model = self._take_on(holders, names)
        with holders.comm.guard("sending rank 0's optimizer state to where its parameters are"):
            self._spread(model)
        self.keep_local()

    def adopt(self, holders: Holders, names: Mapping[str, torch.nn.Parameter]) -> None:
        """Leaves to this rank its parameters of a model that was deployed before, as they are.

        Args:
            holders: who holds the model's parameters.
            names: the model's parameters by name.
        """
        if all(model.holders is not holders for model in self._models):
            self._take_on(holders, names)
            self.keep_local()

    def _take_on(self, holders: Holders, names: Mapping[str, torch.nn.Parameter]) -> _Model:
        model = _Model(holders, {parameter: name for name, parameter in names.items()})
        self._groups = self._layout()
        self._models.append(model)
        return model

    def keep_local(self) -> None:
        """Leaves to this rank the parameters that it holds now."""
        keep_local(self.optimizer, {p for p in self._parameters() if self._is_here(p)})

    def compare(self, comm: Communicator) -> None:
        """Makes sure that all ranks' optimizers are alike. Collective.

        Raises:
            MismatchError: when they differ in parameters or options.
            RaNNCError: when they have parameters that are not the model's.
        """
        rows = meet(
            comm, "the first call of the model, with an optimizer", [int(self._awaits_options)]
        )
        if any(awaits for (awaits,) in rows):
            self._take_options(comm)
        told = self._described()
        rows = comm.all_gather_row([digest(str(told))])
        if all(row == rows[0] for row in rows):
            if (problem := self._problem_of_foreign(self._parameters())) is not None:
                raise problem
            return
        everyone: list[list[str]] = comm.all_gather_objects(told)
        pairs = enumerate(zip(*everyone, strict=False))
        differing = next((index for index, texts in pairs if len({*texts}) > 1), 0)
        lines = "".join(
            f"\n  rank {rank}: {len(texts)} groups, {differing}: {texts[differing]}"
            for rank, texts in enumerate(everyone)
        )
        raise MismatchError(
            f"the processes were given different optimizers:{lines}",
            hint="build the same optimizer, with the same options, on every process",
        )

    def _described(self) -> list[str]:
        return [
            f"{type(self.optimizer).__name__} with {options_of(options)} for "
            f"{', '.join(self._label(p) for p in group.parameters)}"
            for options, group in zip(self.optimizer.param_groups, self._layout(), strict=True)
        ]

    def _take_options(self, comm: Communicator) -> None:
        """Takes the options of rank 0's groups where a state was to be had from there."""
        groups = self.optimizer.param_groups
        own = [{k: v for k, v in g.items() if k not in ("params", "param_names")} for g in groups]
        for group, options in zip(groups, comm.broadcast_object(own), strict=False):
            if self._awaits_options:
                group.update(options)
        self._awaits_options = False

    def undeploy(self, holders: Holders) -> None:
        """Forgets a model; the state of its parameters can no more be gathered.

        Where all of it is here, the optimizer is a plain one again.
        """
        self._models = [model for model in self._models if model.holders is not holders]
        if not self._models and holders.are_all_everywhere:
            self._groups = None

    def make_whole(self, holders: Holders, divided: Mapping[str, torch.nn.Parameter]) -> None:
        """Makes what is kept for parts that of whole parameters, where there are parts. Collective.

        Args:
            holders: who has which part.
            divided: the parameters, by name.
        """
        comm, state = holders.comm, self.optimizer.state
        own = {
            name: announce(state[parameter])
            for name, parameter in divided.items()
            if self._speaker(parameter) == comm.rank and parameter in state
        }
        for part in comm.all_gather_objects(own):
            for name, entries in part.items():
                parameter = divided[name]
                kept = state.get(parameter, {})
                whole = {
                    key: kept.get(key, entry)
                    if not isinstance(entry, Announced)
                    else holders.everywhere(name, kept.get(key), entry.empty(comm.device))
                    for key, entry in entries.items()
                }
                if holders.is_local(name):
                    state[parameter].update(self._moved(parameter, whole))

    def _moved(self, parameter: torch.Tensor, entries: dict[str, Any]) -> dict[str, Any]:
        """Entries with the counter of steps where the optimizer wants it."""
        step = entries.get("step")
        groups = self.optimizer.param_groups
        group = next(group for group in groups if any(p is parameter for p in group["params"]))
        if isinstance(step, torch.Tensor) and (group.get("fused") or group.get("capturable")):
            return {**entries, "step": step.to(parameter.device)}
        return entries

    # ---- The parameters of all ranks

    def _layout(self) -> list[Group]:
        return self._groups or [group_of(group) for group in self.optimizer.param_groups]

    def _parameters(self) -> Iterator[torch.Tensor]:
        """All parameters, each once, in the user's order."""
        yield from dict.fromkeys(p for group in self._layout() for p in group.parameters)

    def _model_of(self, parameter: torch.Tensor) -> _Model | None:
        return next((model for model in self._models if parameter in model.names), None)

    def _is_here(self, parameter: torch.Tensor) -> bool:
        model = self._model_of(parameter)
        return model is None or model.holders.is_local(model.names[parameter])

    def _division(self, parameter: torch.Tensor) -> Division | None:
        model = self._model_of(parameter)
        return None if model is None else model.holders.divisions.get(model.names[parameter])

    def _shape(self, parameter: torch.Tensor) -> torch.Size:
        division = self._division(parameter)
        return parameter.shape if division is None else division.shape

    def _label(self, parameter: torch.Tensor) -> str:
        return self._names.get(parameter, f"another of shape {list(parameter.shape)}")

    def _meet(self, call: str, number: int = 0) -> tuple[Communicator, list[int]]:
        """Makes sure that all ranks are here with the same parameters in the same order.

        Returns:
            The connections to them, and every rank's ``number``.
        """
        if not self._models:
            raise RaNNCError(
                f"`{call}` needs the other processes, which `undeploy` has left",
                hint="call it before `undeploy`",
            )
        comm = self._models[0].holders.comm
        labels = digest(str([[self._label(p) for p in g.parameters] for g in self._layout()]))
        rows = meet(comm, call, [labels, number])
        problem = self._problem_of_groups()
        if any(others != labels for others, _ in rows):
            problem = MismatchError(
                "the processes were given optimizers of different parameters",
                hint="build the same optimizer on every process",
            )
        raise_together(comm, problem)
        return comm, [other for _, other in rows]

    def _problem_of_groups(self) -> RaNNCError | None:
        """Whether someone changed the groups behind our back."""
        wanted = [[p for p in group.parameters if self._is_here(p)] for group in self._layout()]
        found = [group["params"] for group in self.optimizer.param_groups]
        if [[id(p) for p in group] for group in wanted] == [[id(p) for p in g] for g in found]:
            return None
        return RaNNCError(
            f"the optimizer's groups have {[len(group) for group in found]} parameters on this "
            f"process, needed the {[len(group) for group in wanted]} that deployment left there",
            hint="add parameters with `optimizer.add_param_group`, and take some out before the "
            "model is called for the first time",
        )

    # ---- Before the first step

    def _spread(self, model: _Model) -> None:
        """Gives every holder rank 0's state of its parameters."""
        comm, state = model.holders.comm, self.optimizer.state
        here = [p for p in self._parameters() if p in model.names]
        announced = [{} if p not in state else announce(state[p]) for p in here]
        for parameter, entries in zip(here, comm.broadcast_object(announced), strict=True):
            received = {}
            for key, entry in entries.items():
                if not isinstance(entry, Announced):
                    received[key] = entry
                    continue
                received[key] = entry.empty(comm.device)
                if comm.rank == 0:
                    received[key].copy_(state[parameter][key])
                comm.broadcast(received[key], 0)
            if received and self._is_here(parameter):
                # The same object: a step whose closure makes the first call goes on with it.
                state[parameter].clear()
                state[parameter].update(received)
            else:
                state.pop(parameter, None)

    # ---- Gathering

    def _gather(self, comm: Communicator) -> dict[torch.Tensor, dict[str, Any]]:
        """By parameter the whole state on rank 0."""
        parameters = list(self._parameters())
        own = {
            index: announce(self.optimizer.state[parameter])
            for index, parameter in enumerate(parameters)
            if self._speaker(parameter) == comm.rank and parameter in self.optimizer.state
        }
        announced: dict[int, dict[str, Any]] = {}
        for part in comm.all_gather_objects(own):
            announced.update(part)
        return {
            parameters[index]: {
                key: self._bring(parameters[index], key, entry) for key, entry in entries.items()
            }
            for index, entries in sorted(announced.items())
        }

    def _speaker(self, parameter: torch.Tensor) -> int:
        """The rank whose state counts, or that of the first part."""
        model = self._model_of(parameter)
        if model is None:
            return 0
        pieces = model.holders.pieces(model.names[parameter], self._shape(parameter).numel())
        return pieces[0].ranks[0] if pieces else 0

    def _bring(self, parameter: torch.Tensor, key: str, entry: Any) -> Any:
        """One entry of the state on rank 0."""
        if not isinstance(entry, Announced):
            return entry
        model = self._model_of(parameter)
        own = (
            self.optimizer.state[parameter].get(key) if parameter in self.optimizer.state else None
        )
        if model is None:
            return None if own is None else own.detach().cpu().clone()
        device = model.holders.comm.device
        tensor = entry.empty(device) if own is None else own.to(device)
        return model.holders.on_rank_zero(model.names[parameter], tensor)

    def _as_whole(
        self,
        whole: dict[torch.Tensor, dict[str, Any]],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> dict[str, Any]:
        """What the optimizer says of itself while it has all parameters and their state."""
        optimizer = self.optimizer
        own_groups, own_state = [dict(group) for group in optimizer.param_groups], optimizer.state
        kept: dict[Any, Any] = dict(own_state)
        others = {key: v for key, v in kept.items() if not isinstance(key, torch.Tensor)}
        try:
            for group, given in zip(optimizer.param_groups, self._layout(), strict=True):
                group["params"] = given.parameters
                if given.names is not None:
                    group["param_names"] = given.names
            optimizer.state = defaultdict(dict, {**whole, **others})
            return self._plain_state_dict(*args, **kwargs)
        finally:
            optimizer.state = own_state
            for group, own in zip(optimizer.param_groups, own_groups, strict=True):
                group.update(own)

    def _say_partial(self) -> None:
        if self._said_partial or all(
            self._is_here(p) and self._division(p) is None for p in self._parameters()
        ):
            return
        self._said_partial = True
        warnings.warn(
            "`optimizer.state_dict()` has the state of this process's parameters only; "
            "`optimizer.state_dict(from_global=True)`, called on all processes, gives rank 0 that "
            "of all parameters",
            stacklevel=3,
        )

    # ---- Loading

    def _agreed(
        self, state_dict: Mapping[str, Any], *, from_global: bool
    ) -> tuple[Mapping[str, Any], bool]:
        """The state that this process is to take, and whether it is that of all parameters.

        Raises:
            RaNNCError: when the processes do not have states that go together.
        """
        kind = self._kind(state_dict)
        if from_global and kind != Kind.EMPTY:
            kind = Kind.WHOLE
        comm, kinds = self._meet("optimizer.load_state_dict(...)", kind)
        if Kind.EMPTY in kinds and kinds[0] in (Kind.WHOLE, Kind.EITHER):
            with comm.guard("sending rank 0's optimizer state to all processes"):
                state_dict = from_rank_zero(comm, state_dict)
            kinds = [Kind.WHOLE]
        whole = not {Kind.OWN, Kind.EITHER} >= {*kinds}
        raise_together(comm, self._problem(state_dict) if whole else None)
        return state_dict, whole

    def _kind(self, state_dict: Mapping[str, Any]) -> Kind:
        """Whose state it is, by the numbers of parameters and the shapes of what is divided."""
        if not state_dict or not isinstance(state_dict, dict):
            return Kind.EMPTY
        sizes = [len(group["params"]) for group in state_dict.get("param_groups", ())]
        if sizes != [len(group.parameters) for group in self._layout()]:
            own = [len(group["params"]) for group in self.optimizer.param_groups]
            return Kind.OWN if sizes == own else Kind.WHOLE
        if any(not self._is_here(parameter) for parameter in self._parameters()):
            return Kind.WHOLE
        for parameter, entries in self._states(state_dict):
            division = self._division(parameter)
            shapes = {v.shape for v in entries.values() if isinstance(v, torch.Tensor) and v.dim()}
            if division is not None and shapes and parameter.shape != division.shape:
                return Kind.WHOLE if division.shape in shapes else Kind.OWN
        return Kind.EITHER

    def _problem(self, state_dict: Mapping[str, Any]) -> RaNNCError | None:
        """Why a whole state is not one for these parameters."""
        if not isinstance(state_dict, dict) or not {"state", "param_groups"} <= set(state_dict):
            found = list(state_dict) if isinstance(state_dict, dict) else type(state_dict).__name__
            return RaNNCError(
                f"the optimizer's state has {found or 'nothing'} in it, needed `state` and "
                "`param_groups`",
                hint="`state_dict(from_global=True)` gives the state to rank 0: load it there, the "
                "other processes with the empty dictionary that they got",
            )
        sizes = [len(group["params"]) for group in state_dict["param_groups"]]
        needed = [len(group.parameters) for group in self._layout()]
        if sizes != needed:
            return RaNNCError(
                f"the optimizer's state has {sum(sizes)} parameters in groups of {sizes}, but the "
                f"optimizer {sum(needed)} in groups of {needed}",
                hint=_WHOLE_HINT,
            )
        checked = self._states(state_dict) if keeps_alike(self.optimizer) else ()
        for parameter, entries in checked:
            shape = self._shape(parameter)
            for key, value in entries.items():
                if isinstance(value, torch.Tensor) and not suits(value, shape):
                    return RaNNCError(
                        f"`{key}` of `{self._label(parameter)}` has shape {list(value.shape)} in "
                        f"the optimizer's state, but the parameter {list(shape)}",
                        hint=_WHOLE_HINT,
                    )
        return None

    def _states(
        self, state_dict: Mapping[str, Any]
    ) -> Iterator[tuple[torch.Tensor, Mapping[str, Any]]]:
        for group, given in zip(state_dict["param_groups"], self._layout(), strict=True):
            for number, parameter in zip(group["params"], given.parameters, strict=True):
                entries = state_dict["state"].get(number)
                if isinstance(entries, dict):
                    yield parameter, entries

    def _local(self, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """This rank's part of a whole state, in the form of a state."""
        state, groups = dict(state_dict["state"]), []
        for group, given in zip(state_dict["param_groups"], self._layout(), strict=True):
            kept = [self._is_here(parameter) for parameter in given.parameters]
            local = {**group, "params": only(group["params"], kept)}
            if "param_names" in group:
                local["param_names"] = only(group["param_names"], kept)
            groups.append(local)
            for number, parameter, here in zip(
                group["params"], given.parameters, kept, strict=True
            ):
                division = self._division(parameter)
                if not here:
                    state.pop(number, None)
                elif division is not None and number in state:
                    rank = self._models[0].holders.comm.rank
                    state[number] = state_part(state[number], division, rank)
        return {**state_dict, "state": state, "param_groups": groups}

    def _problem_to_add(self, group: Group, told: Sequence[Sequence[str]]) -> RaNNCError | None:
        if any(labels != told[0] for labels in told):
            lines = "".join(f"\n  rank {rank}: {list(text)}" for rank, text in enumerate(told))
            return MismatchError(
                f"the processes add different parameters to the optimizer:{lines}",
                hint="give every process the same of `named_parameters()`",
            )
        if (problem := self._problem_of_foreign(group.parameters)) is not None:
            return problem
        known = set(self._parameters())
        twice = [self._label(p) for p in group.parameters if p in known]
        if twice:
            return RaNNCError(
                f"`{twice[0]}` is in another parameter group of the optimizer already",
                hint="give each parameter to one group",
            )
        return None

    def _problem_of_foreign(self, parameters: Iterable[torch.Tensor]) -> RaNNCError | None:
        """Whether nobody would add up the gradients of some parameters."""
        return foreign_parameters(sum(p not in self._names for p in parameters))
