"""Parameters whose values other ranks hold, and their gradients.

Such a parameter stays in the user's model with its shape, type and name, but without memory, so
that loops over all parameters find all of them. PyTorch asks the class of a tensor before it does
anything with it (``__torch_function__``), and these classes answer for every operation:

- what needs no values (shape, type, ``requires_grad``) runs;
- what writes into such a tensor is left to the ranks that hold it, which run the same line;
- arithmetic that keeps the shape gives another such tensor, so that ``p.data -= rate * p.grad`` and
  averages of every parameter by itself are right;
- everything else is an error: a number, a sum, a write into a tensor that is here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from .errors import RaNNCError

if TYPE_CHECKING:
    from collections.abc import Sequence

_METADATA = frozenset({
    "size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset", "element_size",
    "is_contiguous", "is_floating_point", "is_complex", "is_signed", "is_shared", "is_set_to",
    "get_device", "data_ptr", "untyped_storage", "requires_grad_", "__len__", "__dir__",
    "_is_view", "is_inference", "is_pinned", "type", "has_names", "is_neg", "is_conj",
    "_has_compatible_shallow_copy_type",
})  # fmt: skip
_DRAWS_ALIKE = frozenset({"rand_like", "randn_like", "randint_like"})
"""Draw as many numbers here as where the values are, so that all ranks go on with the same."""
_DRAWS = frozenset({
    "normal_", "uniform_", "random_", "bernoulli_", "exponential_", "geometric_", "cauchy_",
    "log_normal_",
})  # fmt: skip
_VALUES = frozenset({"data", "T", "mT", "H", "mH", "real", "imag"})
"""Properties that show values; all others tell of the tensor."""
_NO_WRITES = frozenset({"__invert__", "__index__", "__int__"})


class _Remote:
    """Answers for a tensor without values here."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs what needs no values, and gives what is as remote as its operands.

        Raises:
            RaNNCError: for all else.
        """
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in ("__get__", "__set__", "__delete__"):
            return _property(func, name, args)
        if name in _METADATA or name in _DRAWS_ALIKE:
            return _plainly(func, args, kwargs)
        writes, target = _written(name, args, kwargs)
        if not writes:
            return _computed(func, name, args, kwargs)
        if isinstance(target, (list, tuple)):
            return _written_here(func, name, target, args, kwargs)
        if not isinstance(target, _Remote):
            raise _refusal_for(name, (args, kwargs))
        if name in _DRAWS:
            outline: Any = target
            drawn = torch.empty(outline.shape, dtype=outline.dtype, device=outline.device)
            _plainly(func, (drawn, *args[1:]), kwargs)
        return target

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Refused."""
        raise _refusal_for("deepcopy", self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refused."""
        raise _refusal_for("pickle", self)

    def __repr__(self) -> str:
        """Name, shape and type."""
        tensor: Any = self
        return f"{_label(tensor)}, held by other ranks, {tensor.dtype}{list(tensor.shape)}"


class RemoteTensor(_Remote, torch.Tensor):  # type: ignore[misc]  # the signature of repr
    """A gradient or another tensor whose values other ranks hold."""


class RemoteParameter(_Remote, torch.nn.Parameter):  # type: ignore[misc]  # likewise
    """A parameter whose values other ranks hold."""


def free_storage(parameter: torch.Tensor, name: str) -> None:
    """Gives back a parameter's memory; its name, shape and type stay readable."""
    with torch._C.DisableTorchFunctionSubclass():
        parameter.data = _nothing(parameter.shape, parameter.dtype, parameter.device)
    if isinstance(parameter, torch.nn.Parameter) and not isinstance(parameter, RemoteParameter):
        parameter._rannc_class = type(parameter)  # type: ignore[attr-defined]
        parameter._rannc_label = f"parameter `{name}`"  # type: ignore[attr-defined]
        parameter.__class__ = RemoteParameter


def restore_storage(parameter: torch.Tensor, values: torch.Tensor | None) -> None:
    """Gives a parameter values again; ``None`` for any."""
    if isinstance(parameter, RemoteParameter):
        parameter.__class__ = parameter._rannc_class  # type: ignore[attr-defined]
    parameter.data = torch.empty_like(parameter) if values is None else values


def mark_gradient(parameter: torch.nn.Parameter) -> None:
    """Notes that a remote parameter has a gradient where its values are."""
    with torch._C.DisableTorchFunctionSubclass():
        if parameter.grad is None:
            parameter.grad = _like(parameter, f"the gradient of {_label(parameter)}")


def local_gradient(parameter: torch.nn.Parameter) -> torch.Tensor | None:
    """The gradient whose values this rank has, if there is one."""
    return None if isinstance(parameter, RemoteParameter) else parameter.grad


def refusal(what: str, label: str) -> RaNNCError:
    """The error for code that needs values which are on other ranks."""
    if "gradient" in label:
        hint = (
            "the RaNNCModule's `calc_grad_norm()` gives the norm of all gradients, and "
            "`get_param_grad(name)` one of them"
        )
    else:
        hint = (
            "call the RaNNCModule, not its parts; its `get_param(name)` and `state_dict()` bring "
            "values, for averages and whatever else you compute; a penalty on parameters belongs "
            "into the model's forward, or is the optimizer's `weight_decay`"
        )
    return RaNNCError(
        f"`{what}` needs the values of {label} of the deployed model, which only other ranks hold",
        hint=f"{hint}. Make these calls on all processes. `parameters(from_global=False)` has what "
        "this process holds",
    )


def _refusal_for(what: str, operands: Any) -> RaNNCError:
    leaves = pytree.tree_leaves(operands)
    return refusal(what, next(_label(leaf) for leaf in leaves if isinstance(leaf, _Remote)))


def _label(tensor: Any) -> str:
    return str(tensor.__dict__.get("_rannc_label", "a tensor"))


def _plainly(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


def _property(func: Any, access: str, args: tuple[Any, ...]) -> Any:
    """Reads, sets or deletes an attribute."""
    name = getattr(getattr(func, "__self__", None), "__name__", "")
    tensor = args[0]
    if not isinstance(tensor, _Remote):
        raise _refusal_for(f".{name}", args)
    if access == "__get__" and name in _VALUES:
        return _computed(func, f".{name}", args, {})
    if access == "__set__" and name == "grad" and args[1] is not None:
        return mark_gradient(tensor)  # type: ignore[arg-type]
    if access == "__set__" and name in _VALUES:
        if name == "data" and args[1].shape == tensor.shape:  # type: ignore[attr-defined]
            return None
        raise _refusal_for(f".{name}", args)
    return _plainly(func, args, {})


def _written(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[bool, Any]:
    """Whether a function writes in place, and into what."""
    if kwargs.get("out") is not None:
        return True, kwargs["out"]
    in_place = (name.endswith("_") and not name.endswith("__")) or (
        name.startswith("__i") and name not in _NO_WRITES
    )
    if in_place or name == "__setitem__":
        return True, args[0] if args else None
    return False, None


def _written_here(
    func: Any, name: str, targets: Sequence[Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Writes into those of a list that are here, as functions on lists of tensors do."""
    here = [index for index, target in enumerate(targets) if not isinstance(target, _Remote)]

    def kept(value: Any) -> Any:
        several = isinstance(value, (list, tuple)) and len(value) == len(targets)
        return [value[index] for index in here] if several else value

    args, kwargs = tuple(map(kept, args)), {key: kept(value) for key, value in kwargs.items()}
    if any(isinstance(leaf, _Remote) for leaf in pytree.tree_leaves((args, kwargs))):
        raise _refusal_for(name, (args, kwargs))
    if here:
        _plainly(func, args, kwargs)
    return targets


def _computed(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a function gives of remote tensors, if that is one value for each of theirs."""
    remote: list[Any] = [
        leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, _Remote)
    ]
    largest = max(remote, key=lambda tensor: tensor.numel())
    if name in ("detach", "clone", ".data", "cpu", "cuda"):
        return _like(largest, _label(largest))

    def outline(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            return torch.empty(leaf.shape, dtype=leaf.dtype, device="meta")
        if isinstance(leaf, torch.device) or (name == "to" and isinstance(leaf, str)):
            return torch.device("meta")
        return leaf

    try:
        with torch._C.DisableTorchFunctionSubclass(), torch.no_grad():
            result = func(*pytree.tree_map(outline, args), **pytree.tree_map(outline, kwargs))
    except Exception:  # what cannot be computed without values
        result = None
    if not isinstance(result, torch.Tensor) or result.shape != largest.shape:
        raise _refusal_for(name, largest)
    return _like(largest, _label(largest), result.dtype)


def _like(tensor: Any, label: str, dtype: torch.dtype | None = None) -> RemoteTensor:
    nothing = _nothing(tensor.shape, dtype or tensor.dtype, tensor.device)
    remote = nothing.as_subclass(RemoteTensor)
    remote.__dict__["_rannc_label"] = label
    return remote


def _nothing(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor of one element's memory, which is no number where PyTorch does not ask us."""
    value = float("nan") if dtype.is_floating_point or dtype.is_complex else 0
    return torch.full((), value, dtype=dtype, device=device).expand(shape)
