"""The tutorial: a stack of square linears, trained over all processes.

    torchrun --nproc-per-node 2 examples/tutorial.py 64 512 10

Arguments: rows of each process's batch, hidden size, number of layers.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

import pyrannc


class Net(nn.Module):
    """`layers` linears of `hidden` x `hidden`."""

    def __init__(self, hidden: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        """Applies one linear after another."""
        for layer in self.layers:
            x = layer(x)
        return x


def main() -> None:
    """Trains the stack to reproduce random targets."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("batch", type=int, help="rows of each process's batch")
    parser.add_argument("hidden", type=int)
    parser.add_argument("layers", type=int)
    parser.add_argument("--steps", type=int, default=10)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    model: nn.Module = Net(arguments.hidden, arguments.layers)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model = pyrannc.RaNNCModule(model, optimizer)

    rank = pyrannc.get_rank()
    torch.manual_seed(1 + rank)
    x = torch.randn(arguments.batch, arguments.hidden)
    target = torch.randn(arguments.batch, arguments.hidden)
    for step in range(arguments.steps):
        optimizer.zero_grad()
        output = model(x)
        loss = nn.functional.mse_loss(output, target.to(output.device))
        loss.backward()
        optimizer.step()
        if rank == 0 and step == 0:
            print(model.deployment)
        if rank == 0:
            print(f"step {step:3d}  loss of rank 0 {loss.item():.6f}", flush=True)


if __name__ == "__main__":
    main()
