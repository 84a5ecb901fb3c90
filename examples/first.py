"""The program of the README: `torchrun --nproc-per-node 2 examples/first.py`."""

import torch

import pyrannc

model = torch.nn.Sequential(*[torch.nn.Linear(512, 512) for _ in range(10)])
optimizer = torch.optim.Adam(model.parameters())
model = pyrannc.RaNNCModule(model, optimizer)  # the one line

for _ in range(5):
    x = torch.randn(64, 512)  # each process brings rows of its own
    output = model(x)
    loss = (output - x.to(output.device)).pow(2).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

if pyrannc.get_rank() == 0:
    print(model.deployment)
