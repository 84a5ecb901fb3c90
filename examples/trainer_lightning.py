"""Lightning: `torchrun --nproc-per-node 2 examples/trainer_lightning.py`."""

import argparse
import json
import os

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data.distributed import DistributedSampler

import pyrannc
from pyrannc.integrations.lightning import RaNNCStrategy


class Regression(lightning.LightningModule):
    """A network that learns a sum."""

    def __init__(self, *, plain: bool) -> None:
        super().__init__()
        self.plain = plain
        self.losses: list[float] = []
        layers = [torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1)]
        self.network: torch.nn.Module = torch.nn.Sequential(*layers)

    def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        """The loss of this process's rows; that of all is kept."""
        x, y = batch
        loss = torch.nn.functional.mse_loss(self.network(x), y)
        mean = self.all_gather(loss.detach())
        assert isinstance(mean, torch.Tensor)
        self.losses.append(mean.mean().item())
        return loss

    def validation_step(self, batch: list[torch.Tensor]) -> None:
        """Logs the loss."""
        x, y = batch
        loss = torch.nn.functional.mse_loss(self.network(x), y)
        self.log("validation", loss, sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimizer, and with it the one line."""
        optimizer = torch.optim.Adam(self.network.parameters(), lr=1e-2)
        if not self.plain:
            self.network = pyrannc.RaNNCModule(self.network, optimizer)
        return optimizer


def main() -> None:
    """Trains, and writes the losses."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plain", action="store_true", help="train without RaNNC on one process")
    parser.add_argument("--rows", type=int, default=4, help="rows of a batch on each process")
    parser.add_argument("--output", default="trained", help="folder of the trained network")
    options = parser.parse_args()
    torch.manual_seed(0)
    x = torch.randn(48, 8)
    data = torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True))
    # Lightning's own sampler would shuffle, and differently for other numbers of processes.
    places = (pyrannc.get_world_size(), pyrannc.get_rank())
    sampler: DistributedSampler[int] = DistributedSampler(data, *places, shuffle=False)
    loader = torch.utils.data.DataLoader(data, batch_size=options.rows, sampler=sampler)
    module = Regression(plain=options.plain)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1 if options.plain else int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        strategy="auto" if options.plain else RaNNCStrategy(),
        max_epochs=2,
        gradient_clip_val=0.5,
        accumulate_grad_batches=2,
        callbacks=[ModelCheckpoint(options.output, filename="last")],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader, loader)
    if trainer.is_global_zero:
        saved = torch.load(f"{options.output}/last.ckpt", weights_only=True)["state_dict"]
        print(
            json.dumps(
                {
                    "losses": module.losses,
                    "validation": trainer.callback_metrics["validation"].item(),
                    "saved": {name: tensor.flatten().tolist() for name, tensor in saved.items()},
                }
            )
        )


if __name__ == "__main__":
    main()
