"""Modules of ordinary operators, for `tests/models.py`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Basic(nn.Module):
    """A small convolutional net for 1 x 32 x 32 pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 5)
        self.second = nn.Conv2d(4, 8, 5)
        self.linears = nn.Sequential(
            nn.Linear(8 * 5 * 5, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 10)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.first(x)), 2)
        x = F.max_pool2d(F.relu(self.second(x)), 2)
        return self.linears(x.view(-1, 8 * 5 * 5))


class SmallParam(nn.Module):
    """Two linears, then multiplications with parameters of no dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(3, 4, bias=False)
        self.down = nn.Linear(4, 3, bias=False)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.gain = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x)) * self.scale * self.gain


class Nest(nn.Module):
    """A model inside a model."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = SmallParam()
        self.outer = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.inner(x))


class LossOut(nn.Module):
    """Returns its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.second = nn.Linear(4, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(self.second(self.first(x)), y)


class MaskedLoss(nn.Module):
    """Cross entropy over the targets that are not -100, of which parts have different numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.head = nn.Linear(8, 11)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        logits = self.head(torch.tanh(self.embedding(tokens)))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)


class SharedParam(nn.Module):
    """Two linears with one weight, and something between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.middle = nn.Linear(4, 4)
        self.last = nn.Linear(4, 4)
        self.last.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.middle(torch.tanh(self.first(x)))))


class SharedEmbedding(nn.Module):
    """The embedding's weight is the output layer's too."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(13, 6)
        self.middle = nn.Linear(6, 6)
        self.head = nn.Linear(6, 13, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.relu(self.middle(self.embedding(tokens))))


class ForkJoin(nn.Module):
    """One value goes two ways that meet again."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 5)
        self.left = nn.Linear(5, 5)
        self.right = nn.Linear(5, 5)
        self.last = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(self.left(x) + self.right(x))


class SharedInput(nn.Module):
    """One intermediate that three later layers and the sum at the end use."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        base = self.layers[0](x)
        x = torch.tanh(self.layers[1](base))
        x = torch.tanh(self.layers[2](base + x))
        x = torch.tanh(self.layers[3](base * x))
        return x + base


class HandLayerNorm(nn.Module):
    """A layer norm by hand that computes in float32 whatever it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.weight = nn.Parameter(torch.ones(6))
        self.bias = nn.Parameter(torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        wide = x.float()
        mean = wide.mean(-1, keepdim=True)
        variance = (wide - mean).pow(2).mean(-1, keepdim=True)
        return self.weight * ((wide - mean) / torch.sqrt(variance + 1e-6)).to(x.dtype) + self.bias


class Normalized(nn.Module):
    """Batch norm between two linears."""

    def __init__(self, *, affine: bool, running: bool) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6, affine=affine, track_running_stats=running)
        self.last = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.norm(self.first(x))))


class OneOp(nn.Module):
    """A single operator without parameters."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 3


class TensorMul(nn.Module):
    """Multiplies with a plain tensor attribute that is no parameter and no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.factor = torch.tensor([1.0, 2.0, 3.0, 4.0])

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.factor.to(x.dtype)


class Embedding(nn.Module):
    """Integers in, vectors out."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.embedding(tokens)


class SeveralOutputs(nn.Module):
    """A tuple out: two tensors that are differentiated, integers, and a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(4, 6)
        self.left = nn.Linear(6, 3)
        self.right = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
        x = torch.tanh(self.trunk(x))
        left, right = self.left(x), self.right(x)
        return left, right, left.argmax(-1), 7


@dataclass
class Report:
    """A result that is a dataclass, as those of Hugging Face models are."""

    logits: Tensor
    extra: dict[str, Tensor]
    note: str = "fine"


class DictInOut(nn.Module):
    """Takes a dictionary, returns a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(3, 4)
        self.right = nn.Linear(2, 4)
        self.last = nn.Linear(4, 2)

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        hidden = torch.relu(self.left(inputs["a"]) + self.right(inputs["b"]))
        return {"hidden": hidden, "logits": self.last(hidden)}


class DataclassOut(nn.Module):
    """Returns a dataclass that holds a dictionary and a string."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 5)
        self.last = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Report:
        hidden = torch.tanh(self.first(x))
        return Report(logits=self.last(hidden), extra={"hidden": hidden})


class Keywords(nn.Module):
    """Keyword arguments, one of them no tensor, one left out."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.last = nn.Linear(4, 2)

    def forward(
        self, x: Tensor, *, mask: Tensor, scale: float = 1.0, bias: Tensor | None = None
    ) -> Tensor:
        hidden = torch.where(mask, self.linear(x) * scale, 0.0)
        return self.last(hidden if bias is None else hidden + bias)


class Recurrent(nn.Module):
    """An LSTM, whose hidden states have their rows in dimension 1, as outputs too."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 5, num_layers=2, batch_first=True)
        self.last = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        output, (_, cell) = self.lstm(x)
        return self.last(output), cell.transpose(0, 1)


class Skips(nn.Module):
    """A small U-net: what each level on the way down makes, one on the way up uses."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 8, 3, padding=1)])
        self.bottom = nn.Conv2d(8, 8, 3, padding=1)
        self.up = nn.ModuleList([nn.Conv2d(16, 4, 3, padding=1), nn.Conv2d(8, 2, 3, padding=1)])

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for layer in self.down:
            x = torch.relu(layer(x))
            skips.append(x)
            x = F.max_pool2d(x, 2)
        x = torch.relu(self.bottom(x))
        for layer, skip in zip(self.up, reversed(skips), strict=True):
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
            x = torch.relu(layer(torch.cat([x, skip], dim=1)))
        return x


class Residual(nn.Module):
    """A residual block as in ResNet: batch norm, and operators that write in place."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.first = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = F.relu(self.first_norm(self.first(x)), inplace=True)
        y = self.second_norm(self.second(y))
        y += x
        y.relu_()
        return self.head(y.mean((2, 3)))


class Contrastive(nn.Module):
    """A loss over all pairs of rows: the batch cannot be taken apart."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(4, 3)
        self.right = nn.Linear(4, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        scores = self.left(x) @ self.right(y).t()
        return F.cross_entropy(scores, torch.arange(x.shape[0], device=x.device))
