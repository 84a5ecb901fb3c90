"""What a module that stands for another one answers to Python and to PyTorch's own wrappers.

Everything of the wrapped model is reached through the wrapper: attributes are read from and written
to it, and a model that is a sequence or a dictionary is one here. What would copy, compile or wrap
a deployed model is told what to do instead.
"""

from __future__ import annotations

import sys
import warnings
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from .errors import RaNNCError
from .optimizer import foreign_parameters

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator


class Wrapper(torch.nn.Module):
    """A module that stands for `model`."""

    model: torch.nn.Module

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets an attribute of the wrapped model, unless the wrapper has one of that name.

        Raises:
            RaNNCError: for a parameter or submodule after the first call, when all are placed.
        """
        own = self.__dict__
        if "model" not in own.get("_modules", ()) or name in own or hasattr(type(self), name):
            super().__setattr__(name, value)
            return
        if name in ("model", "_runtime", "_call"):
            super().__setattr__(name, value)
            return
        if isinstance(value, (torch.nn.Module, torch.nn.Parameter)):
            self._refuse_if_placed(name)
        setattr(self.model, name, value)

    def register_parameter(self, name: str, param: torch.nn.Parameter | None) -> None:
        """Gives the wrapped model a parameter, before its first call."""
        self._refuse_if_placed(name)
        self.model.register_parameter(name, param)

    def register_buffer(
        self,
        name: str,
        tensor: torch.Tensor | None,
        persistent: bool = True,  # noqa: FBT001 - torch's signature
    ) -> None:
        """Gives the wrapped model a buffer, before its first call."""
        self._refuse_if_placed(name)
        self.model.register_buffer(name, tensor, persistent)

    def add_module(self, name: str, module: torch.nn.Module | None) -> None:
        """Gives the wrapped model a submodule, before its first call."""
        self._refuse_if_placed(name)
        self.model.add_module(name, module)

    def _refuse_if_placed(self, name: str) -> None:
        if self.__dict__["_runtime"].deployed:
            raise RaNNCError(
                f"`{name}` cannot be set: the parameters of the model were placed at its first "
                "call",
                hint="change the model before its first call, or wrap it anew",
            )

    def __delattr__(self, name: str) -> None:
        """Deletes an attribute of the wrapper or, without one, of the wrapped model."""
        if name in self.__dict__:
            super().__delattr__(name)
        else:
            delattr(self.model, name)

    def __dir__(self) -> list[str]:
        return sorted({*dir(type(self)), *self.__dict__, *dir(self.model)})

    def __bool__(self) -> bool:
        return True

    def __len__(self) -> int:
        return len(self.model)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.model)  # type: ignore[call-overload, no-any-return]

    def __contains__(self, item: object) -> bool:
        return item in self.model  # type: ignore[operator]

    def __getitem__(self, key: Any) -> Any:
        return self.model[key]  # type: ignore[index]

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        raise _uncopied("copied")

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise _uncopied("pickled")

    def to_empty(self, *args: Any, **kwargs: Any) -> NoReturn:  # noqa: ARG002
        """Refused: it would lose the values of all parameters."""
        raise RaNNCError(
            "`to_empty` would drop the values of a wrapped model's parameters",
            hint="call it on the model before wrapping it",
        )

    def compile(self, *args: Any, **kwargs: Any) -> NoReturn:  # noqa: ARG002
        """Refused: a captured model is run operator by operator."""
        raise RaNNCError(
            "a RaNNCModule cannot be compiled: RaNNC captures the model itself",
            hint="leave `compile()` out; `torch.compile(wrapped)` runs the module as it is",
        )

    def share_memory(self) -> NoReturn:
        """Refused: each process has its own part."""
        raise RaNNCError(
            "the parameters of a RaNNCModule cannot be shared with processes of another kind",
            hint="share the tensors of state_dict()",
        )

    def __prepare_scriptable__(self) -> NoReturn:
        raise not_looked_into("torch.jit.script")

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, torch.nn.Module]]:
        """As in ``nn.Module``; FSDP is refused, which asks for this first of all."""
        _refuse_fsdp()
        found: Iterator[tuple[str, torch.nn.Module]] = super().named_modules(*args, **kwargs)
        return found

    def named_children(self) -> Iterator[tuple[str, torch.nn.Module]]:
        """As in ``nn.Module``; FSDP is refused, which asks for this first of all."""
        _refuse_fsdp()
        return super().named_children()

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Part of loading the state of a module that holds this one.

        Raises:
            RaNNCError: after the first call, when each process has its part.
        """
        if self.__dict__["_runtime"].deployed:
            raise RaNNCError(
                f"the state of a module cannot be loaded with that of the RaNNCModule "
                f"`{prefix.removesuffix('.')}` in it, whose parameters are on several processes",
                hint="take the RaNNCModule's part out of it by the prefix of its names and call "
                "its own load_state_dict(), on all processes; or load before the first call",
            )
        for name in [name for name in state_dict if name.startswith(prefix)]:
            inside = f"{prefix}model.{name.removeprefix(prefix)}"
            state_dict[inside] = state_dict.pop(name)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _replicate_for_data_parallel(self) -> NoReturn:
        raise _wrapped_again("DataParallel")

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> NoReturn:
        """`DistributedDataParallel` asks for this first of all."""
        if sys._getframe(1).f_globals.get("__name__") == "torch.nn.parallel.distributed":
            raise _wrapped_again("DistributedDataParallel")
        raise AttributeError("_ddp_params_and_buffers_to_ignore")


def check_arguments(model: object, optimizer: object, wrapped: Iterable[torch.nn.Module]) -> None:
    """Looks whether a model can be wrapped with this optimizer.

    Args:
        model: the model.
        optimizer: of its parameters, or `None`.
        wrapped: models that are wrapped already.

    Raises:
        RaNNCError: when it cannot.
    """
    if not isinstance(model, torch.nn.Module):
        raise RaNNCError(f"`model` is a {type(model).__name__}, needed a torch.nn.Module")
    if isinstance(model, Wrapper):
        raise RaNNCError("`model` is a RaNNCModule already", hint="wrap the bare model once")
    kind = type(model).__name__
    if kind in ("DistributedDataParallel", "DataParallel", "OptimizedModule", "FSDPModule"):
        raise RaNNCError(
            f"`model` is a {kind}, which RaNNC cannot look into",
            hint="wrap the bare model: RaNNC distributes it itself",
        )
    own = {id(parameter) for parameter in model.parameters()}
    if any(id(parameter) in own for other in wrapped for parameter in other.parameters()):
        raise RaNNCError(
            "parameters of `model` belong to another RaNNCModule, which places them",
            hint="wrap each model once, call undeploy() on the other before, or put models that "
            "share parameters into one module",
        )
    if optimizer is None:
        return
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise RaNNCError(
            f"`optimizer` is a {type(optimizer).__name__}, needed a torch.optim.Optimizer or None"
        )
    foreign = sum(id(p) not in own for group in optimizer.param_groups for p in group["params"])
    if (problem := foreign_parameters(foreign)) is not None:
        raise problem


def check_placement(
    function: Callable[[torch.Tensor], torch.Tensor], parameters: Iterable[torch.nn.Parameter]
) -> None:
    """Looks what `to()` and the like would do to placed parameters, which stay where they are.

    Raises:
        RaNNCError: when it would give them another type.
    """
    with torch._C.DisableTorchFunctionSubclass():
        kinds = {(parameter.dtype, parameter.device) for parameter in parameters}
    for dtype, device in sorted(kinds, key=str):
        result = function(torch.empty(0, dtype=dtype, device=device))
        if result.dtype != dtype:
            raise RaNNCError(
                f"parameters were placed as {dtype} at the first call and cannot be converted to "
                f"{result.dtype} any more",
                hint="call half(), bfloat16(), to(dtype) and the like before the first call",
            )
        if result.device != device:
            warnings.warn(
                f"the parameters stay on {device}, where the first call placed them; to(), cuda() "
                "and cpu() have no effect on a deployed model",
                stacklevel=4,
            )


def _uncopied(what: str) -> RaNNCError:
    return RaNNCError(
        f"a RaNNCModule cannot be {what}: its parameters are on several processes",
        hint="take state_dict(), which rank 0 can save or load into a model of its own; to copy a "
        "model, copy the bare one before wrapping it",
    )


def not_looked_into(what: str) -> RaNNCError:
    """The error for what would need the whole model in one process."""
    return RaNNCError(
        f"`{what}` cannot look into a RaNNCModule, whose parts run on several ranks",
        hint="give it the bare model, with the values of state_dict()",
    )


def refuse_jit() -> None:
    """Stops `torch.jit.trace`, which reads all attributes of a module before it calls it.

    Raises:
        RaNNCError: when it is this that reads one.
    """
    if _asked_by("torch._jit_internal"):
        raise not_looked_into("torch.jit.trace")


def _refuse_fsdp() -> None:
    if _asked_by("torch.distributed.fsdp"):
        raise _wrapped_again("FSDP")


def _asked_by(package: str) -> bool:
    """Whether the caller's caller was called from there, maybe by way of `nn.Module`."""
    frame = sys._getframe(3)
    for _ in range(4):
        if str(frame.f_globals.get("__name__")).startswith(package):
            return True
        if frame.f_back is None:
            return False
        frame = frame.f_back
    return False


def _wrapped_again(kind: str) -> RaNNCError:
    return RaNNCError(
        f"a RaNNCModule cannot be wrapped in {kind}: it replicates and adds up gradients itself",
        hint=f"leave {kind} out",
    )
