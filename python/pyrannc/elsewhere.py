"""Parameters of the user's model whose values are on other ranks.

Such a parameter stays in the model, with its shape and type but without memory. What would read
its values finds an error that says so, whoever asks: a submodule that is called by itself, a method
of the model, or the user's own code. The way is that of PyTorch's uninitialized parameters: the
object gets a class whose ``__torch_function__`` lets through what needs no values.
"""

from __future__ import annotations

from typing import Any

import torch

from .errors import RaNNCError

_METHODS = frozenset({
    "size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset", "element_size",
    "is_contiguous", "is_floating_point", "is_complex", "is_signed", "is_shared", "is_set_to",
    "get_device", "data_ptr", "untyped_storage", "requires_grad_", "__len__", "__dir__",
    "_is_view", "is_inference", "is_pinned", "type", "has_names", "is_neg", "is_conj",
    "_has_compatible_shallow_copy_type",
})  # fmt: skip
_VALUES = frozenset({"data", "T", "mT", "H", "mH", "real", "imag"})
"""Properties that show values; all others tell of the parameter."""


class ElsewhereParameter(torch.nn.Parameter):
    """A parameter without values here."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs what needs no values.

        Raises:
            RaNNCError: for all else.
        """
        name = getattr(func, "__name__", "")
        if name in ("__get__", "__set__", "__delete__"):
            property_name = getattr(getattr(func, "__self__", None), "__name__", "")
            allowed = property_name not in _VALUES
            name = f".{property_name}"
        else:
            allowed = name in _METHODS
        if allowed:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        raise refusal(name)

    def __repr__(self) -> str:  # type: ignore[override]
        """Shape and type."""
        return f"a parameter held by other ranks, {self.dtype}{list(self.shape)}"

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Refused."""
        raise refusal("deepcopy")

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refused."""
        raise refusal("pickle")


def refusal(what: str, name: str | None = None) -> RaNNCError:
    """The error for code that needs values which are on other ranks."""
    which = f"parameter `{name}`" if name else "a parameter"
    return RaNNCError(
        f"`{what}` needs the values of {which} of the deployed model that only other ranks hold",
        hint="call the RaNNCModule itself, on all ranks; its get_param(name) and state_dict() "
        "bring values, which a model of your own can load for whatever else you want to call",
    )


def take_away(parameter: torch.Tensor) -> None:
    """Gives back a parameter's memory; its shape and type stay readable."""
    with torch._C.DisableTorchFunctionSubclass():
        nothing = torch.zeros((), dtype=parameter.dtype, device=parameter.device)
        parameter.data = nothing.expand(parameter.shape)
    if isinstance(parameter, torch.nn.Parameter) and not isinstance(parameter, ElsewhereParameter):
        parameter._rannc_class = type(parameter)  # type: ignore[attr-defined]
        parameter.__class__ = ElsewhereParameter


def bring_back(parameter: torch.Tensor, values: torch.Tensor | None) -> None:
    """Gives a parameter values again; ``None`` for any."""
    if isinstance(parameter, ElsewhereParameter):
        parameter.__class__ = parameter._rannc_class  # type: ignore[attr-defined]
    parameter.data = torch.empty_like(parameter) if values is None else values
