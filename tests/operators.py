"""Operators that torch does not ship: scripted, written in Python, written in C++."""

from __future__ import annotations

import functools
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable


def script(function: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.jit.script`, which newer versions of torch advise against but still have."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(function)


@functools.cache
def scripted_shift() -> Callable[[Tensor, int], Tensor]:
    """A scripted function whose loop depends on the data and which writes in place."""

    def shift(tokens: Tensor, pad: int) -> Tensor:
        shifted = torch.full_like(tokens, pad)
        for row in range(tokens.size(0)):
            count = 0
            for column in range(tokens.size(1)):
                if int(tokens[row, column]) != pad:
                    shifted[row, count] = tokens[row, column]
                    count += 1
        return shifted

    return script(shift)


class Function(nn.Module):
    """Moves padding to the end of each row with a scripted function, then embeds."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.linear = nn.Linear(4, 3)
        self.shift = scripted_shift()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.linear(self.embedding(self.shift(tokens, 0)))


class CustomOp(nn.Module):
    """An operator of somebody's own between two linears."""

    def __init__(self, operator: Callable[[Tensor, float], Tensor]) -> None:
        super().__init__()
        self.first = nn.Linear(4, 5)
        self.last = nn.Linear(5, 3)
        self.operator = operator

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.operator(self.first(x), 0.25))


@functools.cache
def python_operator() -> Callable[[Tensor, float], Tensor]:
    """A leaky rectifier as a `torch.library` operator with a gradient of its own."""

    @torch.library.custom_op("rannc_tests::leaky", mutates_args=())
    def leaky(x: Tensor, slope: float) -> Tensor:
        return torch.where(x > 0, x, slope * x)

    @leaky.register_fake
    def _(x: Tensor, slope: float) -> Tensor:
        return torch.empty_like(x)

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.slope = inputs[1]

    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return torch.where(x > 0, gradient, ctx.slope * gradient), None

    leaky.register_autograd(backward, setup_context=setup)
    return leaky


_NATIVE_SOURCE = """
#include <torch/extension.h>

// Composite: made of operators that know their gradients.
at::Tensor leaky_native(const at::Tensor& x, double slope) {
  return at::where(x > 0, x, x * slope);
}

TORCH_LIBRARY(rannc_tests_native, library) {
  library.def("leaky(Tensor x, float slope) -> Tensor", &leaky_native);
}
"""


@functools.cache
def native_operator() -> Callable[[Tensor, float], Tensor]:
    """The same operator in C++; compiled once and kept in torch's folder of extensions."""
    from torch.utils.cpp_extension import load_inline

    # ninja lies beside python, which need not be on the path.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    with mock.patch.dict(os.environ, PATH=path):
        load_inline("rannc_tests_native", _NATIVE_SOURCE, is_python_module=False)
    return torch.ops.rannc_tests_native.leaky.default


class NativeScripted(nn.Module):
    """The C++ operator called directly and from a scripted function."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 5)
        self.last = nn.Linear(5, 3)
        self.operator = native_operator()

        def twice(x: Tensor) -> Tensor:
            once = torch.ops.rannc_tests_native.leaky(x, 0.5)
            return torch.ops.rannc_tests_native.leaky(once, 0.5)

        self.scripted = script(twice)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.scripted(self.operator(self.first(x), 0.25)))
