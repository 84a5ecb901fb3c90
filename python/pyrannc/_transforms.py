"""Has the exporter see what `torch.func` makes of a function: vmap, grad, vjp, jvp and so on.

The exporter notes operators as the model calls them. Inside of a transform these take batched or
tracing tensors, which make sense only between the calls that begin and end the transform: such
operators could neither be cut apart nor run on descriptions of tensors. So operators that a
transform calls are noted further down, where it has turned them into operators on plain tensors.

This replaces private functions of torch; where another version of torch has them otherwise, the
module that uses a transform is captured as one operator.
"""

from __future__ import annotations

import contextlib
import importlib
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# Where a transform begins to call the user's function. Others are made of these.
_ENTRIES = (
    ("torch._functorch.apis", "vmap_impl"),
    ("torch._functorch.apis", "_chunked_vmap"),
    ("torch._functorch.eager_transforms", "grad_impl"),
    ("torch._functorch.eager_transforms", "grad_and_value_impl"),
    ("torch._functorch.eager_transforms", "_vjp_with_argnums"),
    ("torch._functorch.eager_transforms", "_jvp_with_argnums"),
)


class _Regions(TorchFunctionMode):
    """Notes where `no_grad` and `autocast` regions begin and end, and nothing else."""

    def __init__(self, noting: TorchFunctionMode, noted: Any) -> None:
        super().__init__()
        self._noting = noting
        self._noted = noted

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Calls a function of torch."""
        if func in self._noted:
            return self._noting.__torch_function__(func, types, args, kwargs)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def transforms_seen() -> Iterator[None]:
    """Has the exporter look into transforms while it runs in the body."""
    proxies = importlib.import_module("torch.fx.experimental.proxy_tensor")

    def entered(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with _further_down(proxies):
                result = original(*args, **kwargs)
            if isinstance(result, tuple):  # with a function that goes on in the transform
                functions = (torch.Tensor, torch.nn.Module)
                return tuple(
                    entered(item) if callable(item) and not isinstance(item, functions) else item
                    for item in result
                )
            return result

        return call

    with contextlib.ExitStack() as stack:
        for path, name in _ENTRIES:
            try:
                module = importlib.import_module(path)
                original = getattr(module, name)
            except (ImportError, AttributeError):
                continue
            setattr(module, name, entered(original))
            stack.callback(setattr, module, name, original)
        yield


@contextlib.contextmanager
def _further_down(proxies: Any) -> Iterator[None]:
    """Has the exporter note operators below transforms and differentiation in the body."""
    tracing = proxies.get_proxy_mode()
    if tracing is None or not tracing.pre_dispatch:
        yield
        return
    with (
        proxies.disable_proxy_modes_tracing(),
        proxies._temp_remove_pre_dispatch_torch_function_mode() as regions,
        _Regions(regions, proxies._side_effectful_need_to_be_preserved_pre_dispatch),
        proxies.ProxyTorchDispatchMode(
            tracing.tracer,
            tracing.tracing_mode,
            _allow_fake_constant=tracing._allow_fake_constant,
            _error_on_data_dependent_ops=tracing._error_on_data_dependent_ops,
            decomposition_table=tracing.decomposition_table,
        ),
    ):
        yield
