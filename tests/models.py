"""The models that tests share: each stands for one way in which models differ.

A `Case` makes its model and batches from seeds, so that every process makes the same ones. All of
a case's batch tensors have their rows first. Where the model does not return its loss, `Case.loss`
makes one from the outputs: a mean over rows, so that the means of parts can be weighted by rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from examples.gpt import GPT, GPTConfig
from examples.tutorial import Net
from tests import modules, operators

if TYPE_CHECKING:
    from collections.abc import Callable

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """One model, how to call it, and what a test has to know of it.

    Attributes:
        name: how the test is called.
        module: makes the model; called with the random seed set.
        batch: makes `(args, kwargs)` of so many rows with a generator and a floating-point type.
        loss: a scalar from the model's result; None when the result is the scalar already.
        batch_norm: whether it normalises over the batch: equal to one device only when unsplit.
        float64_ok: whether all of it can run in float64, so that tight tolerances hold.
        splittable: whether parts of the batch can run apart.
        has_parameters: whether there is anything to train.
        slow: whether it takes more than a few seconds to make.
    """

    name: str
    module: Callable[[], nn.Module]
    batch: Callable[[int, torch.Generator, torch.dtype], Arguments]
    loss: Callable[[Any], Tensor] | None = None
    batch_norm: bool = False
    float64_ok: bool = True
    splittable: bool = True
    has_parameters: bool = True
    slow: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """The most precise floating-point type it can run in."""
        return torch.float64 if self.float64_ok else torch.float32

    def make_model(self, seed: int = 0) -> nn.Module:
        """The model, equal for equal seeds."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.module().to(self.dtype)

    def make_batch(self, rows: int, seed: int = 1) -> Arguments:
        """A batch, equal for equal seeds."""
        return self.batch(rows, torch.Generator().manual_seed(seed), self.dtype)

    def make_loss(self, outputs: Any) -> Tensor:
        """The scalar to differentiate."""
        return outputs if self.loss is None else self.loss(outputs)

    def __str__(self) -> str:
        return self.name


def slice_rows(arguments: Arguments, start: int, stop: int) -> Arguments:
    """The same arguments for rows `start` to `stop` only."""
    return _map_tensors(arguments, lambda tensor: tensor[start:stop])


def _map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _map_tensors(item, change) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_map_tensors(item, change) for item in value)
    return value


# ---- Batches and losses


def floats(*shape: int, count: int = 1) -> Callable[..., Arguments]:
    """Batches of `count` tensors of normal numbers, each row of this shape."""

    def make(rows: int, generator: torch.Generator, dtype: torch.dtype) -> Arguments:
        tensors = [
            torch.randn(rows, *shape, generator=generator, dtype=dtype) for _ in range(count)
        ]
        return tuple(tensors), {}

    return make


def whole_numbers(high: int, *shape: int) -> Callable[..., Arguments]:
    """Batches of one integer tensor with entries below `high`."""

    def make(rows: int, generator: torch.Generator, dtype: torch.dtype) -> Arguments:
        return (torch.randint(high, (rows, *shape), generator=generator),), {}

    return make


def mean_square(outputs: Any) -> Tensor:
    """The sum over all tensors of their mean squares."""
    if isinstance(outputs, Tensor):
        return outputs.pow(2).mean()
    if isinstance(outputs, dict):
        outputs = list(outputs.values())
    tensors = [item for item in outputs if isinstance(item, Tensor) and item.is_floating_point()]
    return torch.stack([tensor.pow(2).mean() for tensor in tensors]).sum()


def _masked_batch(rows: int, generator: torch.Generator, dtype: torch.dtype) -> Arguments:
    tokens = torch.randint(11, (rows, 6), generator=generator)
    targets = torch.randint(11, (rows, 6), generator=generator)
    lengths = 1 + torch.arange(rows) * 5 // max(rows - 1, 1)
    return (tokens, targets.masked_fill(torch.arange(6) >= lengths[:, None], -100)), {}


def _dict_batch(rows: int, generator: torch.Generator, dtype: torch.dtype) -> Arguments:
    a = torch.randn(rows, 3, generator=generator, dtype=dtype)
    b = torch.randn(rows, 2, generator=generator, dtype=dtype)
    return ({"a": a, "b": b},), {}


def _keyword_batch(rows: int, generator: torch.Generator, dtype: torch.dtype) -> Arguments:
    x = torch.randn(rows, 4, generator=generator, dtype=dtype)
    mask = torch.rand(rows, 4, generator=generator) > 0.3
    return (x,), {"mask": mask, "scale": 0.5}


def _small_gpt(dropout: float = 0.0) -> nn.Module:
    return GPT(GPTConfig(17, context=8, width=8, heads=2, layers=2, dropout=dropout))


def _gpt_batch(rows: int, generator: torch.Generator, dtype: torch.dtype) -> Arguments:
    tokens = torch.randint(17, (rows, 8), generator=generator)
    targets = torch.randint(17, (rows, 8), generator=generator)
    return (tokens, targets), {}


def _report_loss(report: modules.Report) -> Tensor:
    return mean_square([report.logits, report.extra["hidden"]])


CASES: tuple[Case, ...] = (
    Case("basic", modules.Basic, floats(1, 32, 32), mean_square),
    Case("small_param", modules.SmallParam, floats(3), mean_square),
    Case("nest", modules.Nest, floats(3), mean_square),
    Case("loss_out", modules.LossOut, floats(3, count=2)),
    Case("masked_loss", modules.MaskedLoss, _masked_batch),
    Case("shared_param", modules.SharedParam, floats(4), mean_square),
    Case("shared_embedding", modules.SharedEmbedding, whole_numbers(13, 5), mean_square),
    Case("fork_join", modules.ForkJoin, floats(4), mean_square),
    Case("shared_input", modules.SharedInput, floats(4), mean_square),
    Case("layer_norm", modules.HandLayerNorm, floats(6), mean_square, float64_ok=False),
    Case(
        "norm_without_running",
        lambda: modules.Normalized(affine=True, running=False),
        floats(4),
        mean_square,
        batch_norm=True,
    ),
    Case(
        "norm_without_affine",
        lambda: modules.Normalized(affine=False, running=True),
        floats(4),
        mean_square,
        batch_norm=True,
    ),
    Case(
        "norm_plain",
        lambda: modules.Normalized(affine=False, running=False),
        floats(4),
        mean_square,
        batch_norm=True,
    ),
    Case("identity", nn.Identity, floats(4), mean_square, has_parameters=False),
    Case("one_op", modules.OneOp, floats(4), mean_square, has_parameters=False),
    Case("tensor_mul", modules.TensorMul, floats(4), mean_square),
    Case("embedding", modules.Embedding, whole_numbers(10, 3), mean_square),
    Case("function", operators.Function, whole_numbers(7, 5), mean_square),
    Case(
        "python_op", lambda: operators.CustomOp(operators.python_operator()), floats(4), mean_square
    ),
    Case(
        "native_op",
        lambda: operators.CustomOp(operators.native_operator()),
        floats(4),
        mean_square,
        slow=True,
    ),
    Case("native_scripted", operators.NativeScripted, floats(4), mean_square, slow=True),
    Case("several_outputs", modules.SeveralOutputs, floats(4), mean_square),
    Case("dict_in_out", modules.DictInOut, _dict_batch, mean_square),
    Case("dataclass_out", modules.DataclassOut, floats(4), _report_loss),
    Case("keywords", modules.Keywords, _keyword_batch, mean_square),
    Case("recurrent", modules.Recurrent, floats(4, 3), mean_square),
    Case("gpt", _small_gpt, _gpt_batch),
    Case("skips", modules.Skips, floats(1, 8, 8), mean_square),
    Case("residual", modules.Residual, floats(1, 6, 6), mean_square, batch_norm=True),
    Case("contrastive", modules.Contrastive, floats(4, count=2), splittable=False),
    Case("tutorial", lambda: Net(8, 4), floats(8), mean_square),
)

QUICK_CASES: tuple[Case, ...] = tuple(case for case in CASES if not case.slow)

# Draws random numbers, so it is equal to nothing but itself.
RANDOM_CASE = Case("dropout_gpt", lambda: _small_gpt(0.2), _gpt_batch)


def case(name: str) -> Case:
    """The case of this name."""
    return next(case for case in (*CASES, RANDOM_CASE) if case.name == name)
