"""Trains the small GPT on the source of Python's standard library, over all processes.

    torchrun --nproc-per-node 4 examples/train_gpt.py --steps 30 --reference

Prints what RaNNC decided and the loss as it falls. With `--reference`, rank 0 then trains the same
model in plain PyTorch on the same global batches and shows its losses beside.
"""

from __future__ import annotations

import argparse
import os
import sys
import sysconfig
import time
from pathlib import Path

import torch
from gpt import GPT, GPTConfig
from torch import Tensor, nn

import pyrannc

TOLERANCE = 1e-3


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=32, help="rows of the global batch")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reference", action="store_true", help="train without RaNNC as well")
    return parser.parse_args()


def load_text(limit_bytes: int = 1_000_000) -> Tensor:
    """The standard library's modules one after another, as bytes."""
    text = bytearray()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text += path.read_bytes()
        if len(text) >= limit_bytes:
            break
    return torch.frombuffer(text[:limit_bytes], dtype=torch.uint8).long()


def global_batch(
    text: Tensor, step: int, arguments: argparse.Namespace, context: int
) -> tuple[Tensor, Tensor]:
    """The rows of one step, the same on every process: tokens, and each one's successor."""
    generator = torch.Generator().manual_seed(arguments.seed * 1_000_003 + step)
    starts = torch.randint(len(text) - context, (arguments.batch,), generator=generator)
    rows = text[starts[:, None] + torch.arange(context + 1)]
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def build(arguments: argparse.Namespace) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The model and its optimizer, the same on every process."""
    torch.manual_seed(arguments.seed)
    model = GPT(GPTConfig(layers=arguments.layers, width=arguments.width))
    return model, torch.optim.AdamW(model.parameters(), lr=3e-3)


def train(text: Tensor, arguments: argparse.Namespace) -> list[float]:
    """Trains over all processes; the two lines that differ from plain PyTorch are marked."""
    model, optimizer = build(arguments)
    model = pyrannc.RaNNCModule(model, optimizer)  # RaNNC
    rank, world_size = pyrannc.get_rank(), pyrannc.get_world_size()
    mine = slice(arguments.batch * rank // world_size, arguments.batch * (rank + 1) // world_size)
    losses, start = [], time.perf_counter()
    for step in range(arguments.steps):
        tokens, targets = global_batch(text, step, arguments, context=64)
        optimizer.zero_grad()
        loss = model(tokens[mine], targets[mine])  # RaNNC: this process's rows
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if rank == 0 and step == 0:
            print(model.deployment)
            print(
                f"captured, planned and ran the first step in {time.perf_counter() - start:.1f} s"
            )
            start = time.perf_counter()
        if rank == 0 and (step % 5 == 0 or step == arguments.steps - 1):
            print(f"step {step:4d}  loss {losses[-1]:.6f}", flush=True)
    if rank == 0 and arguments.steps > 1:
        step_ms = (time.perf_counter() - start) / (arguments.steps - 1) * 1e3
        print(f"{step_ms:.1f} ms a step over {world_size} processes")
    return losses


def train_plainly(text: Tensor, arguments: argparse.Namespace) -> list[float]:
    """The same training in one plain PyTorch process."""
    model, optimizer = build(arguments)
    device = torch.device("cpu")
    if torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator() or device
    model.to(device)
    losses = []
    for step in range(arguments.steps):
        tokens, targets = global_batch(text, step, arguments, context=64)
        optimizer.zero_grad()
        loss = model(tokens.to(device), targets.to(device))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def compare(losses: list[float], plain: list[float]) -> bool:
    """Prints both lists side by side; whether they agree."""
    print("\nstep      RaNNC  one plain process  difference")
    for step, (ours, theirs) in enumerate(zip(losses, plain, strict=True)):
        if step % 5 == 0 or step == len(losses) - 1:
            print(f"{step:4d} {ours:10.6f} {theirs:18.6f} {abs(ours - theirs):11.1e}")
    difference = max(abs(ours - theirs) for ours, theirs in zip(losses, plain, strict=True))
    agree = difference <= TOLERANCE
    print(
        f"largest difference over {len(losses)} steps: {difference:.1e}"
        f" ({'within' if agree else 'MORE THAN'} {TOLERANCE:.0e})"
    )
    return agree


def main() -> int:
    """Trains, compares if asked to, and says by the exit code whether the losses agree."""
    arguments = parse_arguments()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    text = load_text()
    losses = train(text, arguments)
    agree = True
    if arguments.reference and pyrannc.get_rank() == 0:
        agree = compare(losses, train_plainly(text, arguments))
    pyrannc.barrier()
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
