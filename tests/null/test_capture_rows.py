"""Where the rows of the batch lie, checked by running parts of the batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.null.capturing import captured_graph, check_against_bare, check_parts

if TYPE_CHECKING:
    from collections.abc import Callable

ROWS = 6


class Function(nn.Module):
    """A function as a model, with a parameter to train."""

    def __init__(self, function: Callable[[Tensor], Any], shape: tuple[int, ...]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.scale = nn.Parameter(torch.rand(shape[-1]).double() + 0.5)
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x * self.scale)


def _recurrent(kind: type[nn.RNNBase], *, batch_first: bool) -> Callable[[Tensor], Any]:
    torch.manual_seed(0)
    layer = kind(4, 4, batch_first=batch_first).double()
    return lambda x: layer(x)


def _window(x: Tensor) -> Tensor:
    """Swin-like: windows become rows of their own, then come back."""
    windows = x.view(-1, 2, 2, 4).permute(0, 2, 1, 3).reshape(-1, 2, 4)
    attended = windows @ windows.transpose(-1, -2) @ windows
    return attended.view(-1, 2, 2, 4).permute(0, 2, 1, 3).reshape(-1, 4, 4)


def _heads_first(x: Tensor) -> Tensor:
    """Time first, as `nn.MultiheadAttention` does: heads and rows share a dimension."""
    t = x.transpose(0, 1).contiguous()
    heads = t.view(4, -1, 2).transpose(0, 1)
    joined = torch.bmm(torch.bmm(heads, heads.transpose(1, 2)), heads)
    return joined.transpose(0, 1).reshape(-1, 4)


def _last_of_each(x: Tensor) -> Tensor:
    lengths = x.detach().sum((1, 2)).abs().long() % 4
    return x[torch.arange(x.size(0)), lengths]


def _filled(x: Tensor) -> Tensor:
    buffer = torch.zeros(x.size(0), 4, dtype=x.dtype)
    buffer[:, 1:3] = x[:, 0, 1:3] * 2
    return buffer


def _class_token(x: Tensor) -> Tensor:
    token = torch.ones(1, 1, 4, dtype=x.dtype)
    return torch.cat([token.expand(x.size(0), -1, -1), x], 1)


def _causal(x: Tensor) -> Tensor:
    mask = torch.full((4, 4), float("-inf"), dtype=x.dtype).triu(1)
    return F.scaled_dot_product_attention(x, x, x, mask)


ROW_WISE: dict[str, Callable[[Tensor], Any]] = {
    "softmax": lambda x: x.softmax(1),
    "cumsum": lambda x: x.cumsum(-1),
    "sort": lambda x: x.sort(1).values,
    "topk": lambda x: x.topk(2).values,
    "flip and roll": lambda x: x.flip(1).roll(1, 2),
    "reductions": lambda x: (x.mean(1), x.amax(-1), x.std((1, 2)), x.logsumexp(1), x.norm(dim=1)),
    "split": lambda x: [part * 2 for part in x.split(2, 1)],
    "unbind": lambda x: x.unbind(1),
    "chunk": lambda x: x.chunk(2, -1)[1],
    "cat": lambda x: torch.cat([x, x * 2], 1),
    "stack first": lambda x: torch.stack([x, x * 2]),
    "transposes": lambda x: x.transpose(0, 1).permute(2, 0, 1) * 3,
    "flatten": lambda x: x.flatten(1).unflatten(1, (8, 2)),
    "tokens as rows": lambda x: x.reshape(-1, 4) @ torch.ones(4, 4, dtype=x.dtype),
    "time first flat": lambda x: x.transpose(0, 1).reshape(-1, 4).tanh(),
    "there and back": lambda x: x.transpose(0, 1).reshape(-1, 4).view(4, -1, 4).transpose(0, 1),
    "windows": _window,
    "heads first": _heads_first,
    "matmul": lambda x: x @ x.transpose(1, 2),
    "matmul left": lambda x: torch.ones(3, 4, dtype=x.dtype) @ x,
    "bmm": lambda x: torch.bmm(x, x),
    "baddbmm": lambda x: torch.baddbmm(x, x, x),
    "addmm": lambda x: torch.addmm(torch.ones(4, dtype=x.dtype), x[:, 0], torch.eye(4).double()),
    "mv": lambda x: x @ torch.ones(4, dtype=x.dtype),
    "einsum": lambda x: torch.einsum("bij,bkj->bik", x, x),
    "einsum dots": lambda x: torch.einsum("...ij,jk->...ik", x, torch.eye(4).double()),
    "einsum rows second": lambda x: torch.einsum("tbc,tbd->bcd", *[x.transpose(0, 1)] * 2),
    "attention": lambda x: F.scaled_dot_product_attention(x, x, x),
    "causal": _causal,
    "layer norm": lambda x: F.layer_norm(x, (4,)),
    "group norm": lambda x: F.group_norm(x, 2),
    "rms norm": lambda x: F.rms_norm(x, (4,)),
    "conv": lambda x: F.conv1d(x, torch.ones(3, 4, 2, dtype=x.dtype)),
    "pool": lambda x: F.max_pool1d(x, 2),
    "adaptive pool": lambda x: F.adaptive_avg_pool1d(x, 2),
    "interpolate": lambda x: F.interpolate(x, scale_factor=2.0),
    "pad": lambda x: F.pad(x, (1, 1, 2, 0)),
    "pixel shuffle": lambda x: F.pixel_shuffle(x.unsqueeze(-1), 2),
    "lstm": _recurrent(nn.LSTM, batch_first=True),
    "lstm time first": lambda x: _recurrent(nn.LSTM, batch_first=False)(x.transpose(0, 1)),
    "gru": _recurrent(nn.GRU, batch_first=True),
    "rnn": _recurrent(nn.RNN, batch_first=True),
    "gather": lambda x: x.gather(1, (x > 0.5).long()),
    "index constants": lambda x: x[:, torch.tensor([2, 0])],
    "index own rows": _last_of_each,
    "table": lambda x: torch.arange(4.0).double()[(x > 0.5).long()] * x,
    "masks": lambda x: x.masked_fill(x > 1, 0.0).where(x > 0, x * 2),
    "one hot": lambda x: F.one_hot((x > 0.5).long(), 2) * x.unsqueeze(-1),
    "expand": lambda x: x[:, :1].expand(-1, 3, -1) * 2,
    "repeat": lambda x: x.repeat(1, 2, 1),
    "repeat rows": lambda x: x.repeat(2, 1, 1) * 2,
    "repeat each row": lambda x: x.repeat_interleave(3, 0) * 2,
    "class token": _class_token,
    "filled buffer": _filled,
    "ones of the batch": lambda x: x + torch.ones(x.size(0), 1, 4, dtype=x.dtype),
    "ones of all tokens": lambda x: x.transpose(0, 1).reshape(-1, 4) * x.new_ones(x.size(0) * 4, 1),
    "in place": lambda x: (x + 1).add_(x).relu_(),
    "bool": lambda x: ((x > 0.5) & (x < 1)).any(-1),
    "complex": lambda x: torch.view_as_real(torch.view_as_complex(x.view(-1, 4, 2, 2)) * 1j),
    "fft": lambda x: torch.fft.rfft(x, dim=1).abs(),
    "unfold": lambda x: x.unfold(1, 2, 1),
    "diagonal": lambda x: x.diagonal(dim1=1, dim2=2),
    "cosine": lambda x: F.cosine_similarity(x[:, 0], x[:, 1]),
    "cdist": lambda x: torch.cdist(x, x),
    "outer": lambda x: x[:, 0].unsqueeze(-1) * x[:, 1].unsqueeze(1),
    "lerp": lambda x: torch.lerp(x, x * 2, 0.3),
    "squeeze": lambda x: x[:, :1].squeeze(),
    "triangle": lambda x: x.tril(),
    "dropout": lambda x: F.dropout(x, 0.0),
}  # fmt: skip
INEXACT = ("lstm", "lstm time first", "gru", "rnn")
MIXING: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "softmax": (lambda x: x.softmax(0), "aten.softmax"),
    "cumsum": (lambda x: x.cumsum(0), "aten.cumsum"),
    "sort": (lambda x: x.sort(0).values, "aten.sort"),
    "flip": (lambda x: x.flip(0), "aten.flip"),
    "roll": (lambda x: x.roll(1), "aten.roll"),
    "roll rows": (lambda x: x.roll(1, 0), "aten.roll"),
    "cat": (lambda x: torch.cat([x, x]), "aten.cat"),
    "layer norm": (lambda x: F.layer_norm(x.permute(1, 2, 0), (ROWS,)), "one batch size"),
    "first row": (lambda x: x[0], "aten.select"),
    "some rows": (lambda x: x[1:] * 2, "aten.slice"),
    "product": (lambda x: x[:, 0] @ x[:, 1].T, "aten.matmul"),
    "contraction": (lambda x: x[:, 0].T @ x[:, 1], "aten.matmul"),
    "attention over rows": (
        lambda x: F.scaled_dot_product_attention(*[x.transpose(0, 1)] * 3),
        "aten.scaled_dot_product_attention",
    ),
    "mixed order": (
        lambda x: x.reshape(-1, 4) * x.transpose(0, 1).reshape(-1, 4),
        "aten.mul",
    ),
    "half the rows": (lambda x: x.view(2, x.size(0) // 2, 4, 4) * 1, "aten.view"),
    "chosen rows": (lambda x: x[torch.arange(x.size(0)).flip(0)], "aten.flip"),
    "row numbers": (lambda x: x + torch.arange(x.size(0)).view(-1, 1, 1), "aten.add"),
    "all pairs": (lambda x: x[:, None, 0] - x[None, :, 0], "aten.sub"),
    "unknown": (lambda x: torch.trace(x[:, 0]), "aten.trace"),
    "pairwise": (lambda x: torch.cdist(x[:, 0], x[:, 0]), "aten.cdist"),
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("name", ROW_WISE)
def test_row_wise_operators_run_in_parts(name: str) -> None:
    model, bare = Function(ROW_WISE[name], (4,)), Function(ROW_WISE[name], (4,))
    x = torch.rand(ROWS, 4, 4).double()
    graph = captured_graph(model, x)
    # One row alone loses its dimension in the bare model's `squeeze`, not in a part's.
    for rows in (ROWS,) if name == "squeeze" else (ROWS, 1):
        check_against_bare(model, graph, (x[:rows],), {}, exact=name not in INEXACT, bare=bare)
    check_parts(model, graph, [x], [1, 2], 1e-12)


@pytest.mark.parametrize("name", MIXING)
def test_operators_across_rows_forbid_parts(name: str) -> None:
    function, culprit = MIXING[name]
    model = Function(function, (4,))
    x = torch.rand(ROWS, 4, 4).double()
    graph = captured_graph(model, x)
    assert not graph.splittable
    assert culprit in graph.reason
    assert all(rows != "sum" for rows in graph.output_rows)
    check_against_bare(model, graph, (x,), {}, bare=Function(function, (4,)))
