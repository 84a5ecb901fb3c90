"""Finds the part of a model that the exporter stumbles over, and runs the model around it."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from torch.fx.experimental import proxy_tensor
from torch.nn.modules import module as module_hooks

from . import _host_random
from ._host_random import HostState
from ._obstacles import BACKWARD, Obstacle, is_by_content, place_of, reason_of
from ._opaque import Opaque, Site, put_back
from .errors import CaptureError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class CustomBackward(Exception):
    """Raised when an `autograd.Function` that no site stands for is called during export."""

    def __init__(self, function: type) -> None:
        super().__init__(function.__qualname__)
        self.function = function


class Caught(Exception):
    """Raised at the end of an export in which suspects had to be replaced."""


class Tracker:
    """Knows which submodule is running.

    Attributes:
        running: the submodules whose forward has begun and not ended, outermost first.
        drew: whether anything drew from Python's or NumPy's generator.
        drawing: the submodules whose own forward did, if somebody wants to know which.
    """

    def __init__(self) -> None:
        self.running: list[torch.nn.Module] = []
        self.drew = False
        self.drawing: list[torch.nn.Module] | None = None
        self._drawn = HostState()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watches all modules while the body runs; a failure leaves `running` as it was then."""
        self.running.clear()
        first = self._drawn = HostState()
        before = module_hooks.register_module_forward_pre_hook(self._enter)
        after = module_hooks.register_module_forward_hook(self._leave)
        try:
            yield
        finally:
            before.remove()
            after.remove()
            self.drew = HostState() != first

    def _enter(self, module: torch.nn.Module, args: Any) -> None:
        del args
        self._note_draws()
        self.running.append(itself(module))

    def _leave(self, module: torch.nn.Module, args: Any, result: Any) -> None:
        del args, result
        self._note_draws()
        while self.running and self.running.pop() is not itself(module):
            pass

    def _note_draws(self) -> None:
        if self.drawing is None:
            return
        now = HostState()
        if now != self._drawn and self.running:
            self.drawing.append(self.running[-1])
        self._drawn = now


def itself(module: torch.nn.Module) -> torch.nn.Module:
    """The module that the exporter has another one stand for, if it has several names."""
    standing_in = getattr(proxy_tensor, "_AttrProxy", ())
    return module.get_base() if isinstance(module, standing_in) else module


class Sites:
    """All parts of a model that are called as they are.

    *Suspects* are of the class of a part that stopped the exporter. They run for real while sites
    are observed, too, so that in one export all of them are found that stop it.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._modules: dict[torch.nn.Module, Site] = {}
        self._functions: dict[type, Site] = {}
        self._suspects: dict[torch.nn.Module, Site] = {}
        self._caught: dict[torch.nn.Module, Exception] = {}
        self._noted: dict[str, Obstacle] = {}

    def __bool__(self) -> bool:
        return bool(self._modules or self._functions)

    @property
    def calls(self) -> dict[str, Opaque]:
        """The sites' calls during the last export, by the name of their operator."""
        sites = [*self._modules.values(), *self._functions.values()]
        return {name: call for site in sites for name, call in site.calls.items()}

    @property
    def obstacles(self) -> list[Obstacle]:
        """What stopped the exporter, for each part that is called as it is."""
        return [
            self._noted[key]
            for key in [*self.paths, *map(str, self._functions)]
            if key in self._noted
        ]

    def add_function(self, function: type, place: str = "") -> None:
        """Makes all calls of a custom `autograd.Function` opaque."""
        self._noted[str(function)] = Obstacle(function.__qualname__, None, place, BACKWARD)
        self._functions[function] = Site(function.__qualname__, getattr(function, "apply"))  # noqa: B009

    def add_module(
        self, culprit: torch.nn.Module | None, reason: str = "", place: str = ""
    ) -> torch.nn.Module:
        """Makes a submodule opaque, or the smallest one around it that is not yet; gives it."""
        names = {module: name for name, module in self._model.named_modules()}
        path = names.get(culprit, "") if culprit is not None else ""
        while self._model.get_submodule(path) in self._modules and path:
            path = path.rpartition(".")[0]
        module = self._model.get_submodule(path)
        if module in self._modules:
            message = f"`{type(self._model).__name__}` cannot be captured, not even as a whole"
            raise CaptureError(message)
        for inner in module.modules():
            self._modules.pop(inner, None)
            self._suspects.pop(inner, None)
        self._modules[module] = _site(module, names)
        if reason:
            self._noted[path] = Obstacle(type(module).__name__, path, place, reason)
        return module

    def suspect(self, culprit: torch.nn.Module) -> None:
        """Suspects all modules of a culprit's class."""
        names = {module: name for name, module in self._model.named_modules()}
        kin = [module for module in names if type(module) is type(culprit)]
        inside = {part for site in [*self._modules, *kin] for part in site.modules()} - {*kin}
        for module in kin:
            if module not in inside and module not in self._modules:
                self._suspects[module] = _site(module, names)

    def convict(self) -> None:
        """Makes the suspects opaque that stopped the last export."""
        caught, self._caught = self._caught, {}
        self._suspects.clear()
        for module, failure in caught.items():
            self.add_module(module, reason_of(failure), place_of(failure))

    @property
    def paths(self) -> list[str]:
        """The submodules among them."""
        names = {module: name for name, module in self._model.named_modules()}
        return [names[module] for module in self._modules]

    def observe(self, run: Callable[[int], Any], sizes: tuple[int, ...]) -> None:
        """Runs the model for real at some batch sizes; leaves it as it was.

        Args:
            run: runs the model with the given number of rows.
            sizes: the batch sizes; only the first must work.
        """
        if any(tensor.is_meta for tensor in self._model.parameters()):
            message = "a part of the model can only be captured by running it, on real parameters"
            raise CaptureError(message, "create the model on a real device")
        for site in self._all():
            site.forget()
        for number, rows in enumerate(sizes):
            try:
                with undisturbed(self._model), self._swapped(rows):
                    run(rows)
            except Exception:
                if number == 0:
                    raise
                for site in self._all():
                    site.forget(rows)

    @contextlib.contextmanager
    def standing_in(self, running: list[torch.nn.Module]) -> Iterator[None]:
        """Has operators without insides in place of the sites while the body exports.

        Args:
            running: the submodules that run, outermost first.

        Raises:
            Caught: when suspects stopped it.
        """

        def leave(module: torch.nn.Module, args: Any, result: Any) -> None:
            del args, result
            if module is self._model and self._caught:
                raise Caught

        self._caught.clear()
        after = module_hooks.register_module_forward_hook(leave)
        try:
            with self._swapped(None, running):
                yield
        finally:
            after.remove()

    def _all(self) -> list[Site]:
        return [*self._modules.values(), *self._suspects.values(), *self._functions.values()]

    def _tried(self, module: torch.nn.Module, site: Site, running: list[torch.nn.Module]) -> Any:
        """Has a suspect be exported; if it stops the exporter, an operator stands in for it."""

        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                result = site.function(*args, **kwargs)
            except Exception as failure:
                if not is_by_content(failure) or running[-1:] != [module]:
                    raise
                self._caught[module] = failure
                return site.trace(args, kwargs)
            site.skip()
            return result

        return call

    @contextlib.contextmanager
    def _swapped(
        self, rows: int | None, running: list[torch.nn.Module] | None = None
    ) -> Iterator[None]:
        """Leads the sites' calls to `observe` (with a batch size) or `trace` (without)."""
        for site in self._all():
            site.begin()

        def lead(site: Site) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                if rows is None:
                    return site.trace(args, kwargs)
                return site.observe(rows, args, kwargs)

            return call

        with contextlib.ExitStack() as stack:
            for module, site in self._modules.items():
                stack.enter_context(_attribute(module, "forward", lead(site)))
            for module, site in self._suspects.items():
                call = lead(site) if running is None else self._tried(module, site, running)
                stack.enter_context(_attribute(module, "forward", call))
            leads = {function: lead(site) for function, site in self._functions.items()}
            stack.enter_context(_custom_backwards(leads, refuse=rows is None))
            yield


def _site(module: torch.nn.Module, names: dict[torch.nn.Module, str]) -> Site:
    inside = [(names[part], part) for part in module.modules()]
    return Site(type(module).__name__, module.forward, inside)


@contextlib.contextmanager
def _attribute(holder: torch.nn.Module, name: str, value: Any) -> Iterator[None]:
    """Sets an attribute of an instance while the body runs."""
    before = holder.__dict__.get(name)
    holder.__dict__[name] = value
    try:
        yield
    finally:
        if before is None:
            del holder.__dict__[name]
        else:
            holder.__dict__[name] = before


@contextlib.contextmanager
def _custom_backwards(leads: dict[type, Callable[..., Any]], *, refuse: bool) -> Iterator[None]:
    """Catches calls of custom `autograd.Function`s: the exporter would lose their backward."""
    original = torch.autograd.Function.__dict__["apply"]

    def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        if cls in leads:
            with _restored(original):
                return leads[cls](*args, **kwargs)
        if cls.__module__ == "torch.utils.checkpoint":
            # Calls its first argument without gradients, and again in backward.
            return args[0](*args[2:])
        if refuse and not cls.__module__.startswith("torch."):
            raise CustomBackward(cls)
        return original.__get__(None, cls)(*args, **kwargs)

    setattr(torch.autograd.Function, "apply", classmethod(apply))  # noqa: B010
    try:
        yield
    finally:
        setattr(torch.autograd.Function, "apply", original)  # noqa: B010


@contextlib.contextmanager
def _restored(original: Any) -> Iterator[None]:
    patched = torch.autograd.Function.__dict__["apply"]
    torch.autograd.Function.apply = original
    try:
        yield
    finally:
        torch.autograd.Function.apply = patched


@contextlib.contextmanager
def undisturbed(model: torch.nn.Module) -> Iterator[None]:
    """Has the body run without gradients; puts buffers and random numbers back as they were."""
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    with torch.random.fork_rng(), _host_random.kept(), torch.no_grad():
        try:
            yield
        finally:
            for buffer, before in buffers:
                put_back(buffer, before)
