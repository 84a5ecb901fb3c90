"""Calls of a deployed model that go past the wrapper.

Methods of the model may call it or its parts: ``generate()``, ``forward_features()``. Once
deployed, the parts of a model are on several ranks, and a call of one by itself would compute with
what happens to be here, or give gradients that no other rank hears of. So every part that has
parameters is watched, and such calls are errors. So are state dictionaries without all values.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from .errors import RaNNCError
from .remote import RemoteParameter, refusal

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Iterator

_lifted: list[bool] = []


@contextlib.contextmanager
def lifted() -> Iterator[None]:
    """Lets the body call parts of deployed models: those that are captured or left whole."""
    _lifted.append(True)
    try:
        yield
    finally:
        _lifted.pop()


def check_data(tensors: Iterable[torch.Tensor | None], what: str) -> None:
    """Looks for tensors of the exporter's, which have no data, before they reach a send.

    Raises:
        RaNNCError: when there is one.
    """
    for tensor in tensors:
        if isinstance(tensor, FakeTensor):
            raise RaNNCError(
                f"{what} comes from a tensor without data that code kept while the model was "
                "captured",
                hint="have forward return what is needed outside of it, in place of keeping it "
                "in an object or a library that outlives the call",
            )


class _Hook:
    """A hook of ours on a submodule, of which copies and pickles do not have it."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _nothing_to_watch, ()


class _Guard(_Hook):
    """Watches calls of one submodule."""

    def __init__(self, path: str, names: list[str], divided: Container[str]) -> None:
        self.path = path
        self.names = names
        self.divided = divided

    def __call__(self, module: torch.nn.Module, args: Any) -> None:  # noqa: ARG002 - torch's
        if _lifted:
            return
        own = dict(module.named_parameters(recurse=False))
        what = f"{self.path or 'the model'}.forward"
        for (_, parameter), name in zip(own.items(), self.names, strict=False):
            if isinstance(parameter, RemoteParameter):
                raise refusal(what, f"parameter `{name}`")
            if name in self.divided:
                raise RaNNCError(
                    f"`{what}` needs the parameter `{name}`, which replicas divide among "
                    "themselves: outside of the RaNNCModule's own calls each has but a part of it",
                    hint="call the RaNNCModule itself, on all ranks",
                )
        if torch.is_grad_enabled():
            raise RaNNCError(
                f"`{what}` of the deployed model was called by itself, and gradients are recorded: "
                "they would be those of this rank's rows alone",
                hint="call the RaNNCModule itself, on all ranks; without gradients, under "
                "torch.no_grad(), this rank may call it",
            )


class _StateGuard(_Hook):
    """Watches state dictionaries of one submodule."""

    def __init__(self, names: list[str], divided: Container[str]) -> None:
        self.names = names
        self.divided = divided

    def __call__(self, module: torch.nn.Module, *_: Any) -> None:
        if _lifted:
            return
        for parameter, name in zip(module.parameters(recurse=False), self.names, strict=False):
            if isinstance(parameter, RemoteParameter):
                reason = f"only other ranks hold `{name}`"
            elif name in self.divided:
                reason = f"replicas divide `{name}` among themselves"
            else:
                continue
            raise RaNNCError(
                f"`state_dict()` of the deployed model would be this rank's part of it: {reason}",
                hint="call the RaNNCModule's own state_dict(), on all ranks",
            )


def _nothing_to_watch() -> Callable[..., None]:
    return _ignore


def _ignore(*_: Any) -> None:
    """Watches nothing."""


class Guards:
    """The guards of one deployed model."""

    def __init__(self, model: torch.nn.Module, divided: Container[str]) -> None:
        """Watches every part of ``model`` that has parameters.

        Args:
            model: the deployed model.
            divided: names of the parameters of which this rank has but a part.
        """
        self._handles = []
        first = {id(p): name for name, p in model.named_parameters()}
        for path, module in model.named_modules():
            names = [first[id(p)] for _, p in module.named_parameters(recurse=False)]
            if names:
                hook = _Guard(path, names, divided)
                self._handles.append(module.register_forward_pre_hook(hook, prepend=True))
                watch = _StateGuard(names, divided)
                self._handles.append(module.register_state_dict_pre_hook(watch))

    def remove(self) -> None:
        """Watches no longer."""
        for handle in self._handles:
            handle.remove()


def is_guard(hook: object) -> bool:
    """Whether a pre-hook is one of ours."""
    return isinstance(hook, _Hook) or hook is _ignore
