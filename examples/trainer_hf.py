"""Hugging Face's Trainer: `torchrun --nproc-per-node 2 examples/trainer_hf.py`.

Beside a script without RaNNC there is one other word: `RaNNCTrainer` for `Trainer`.
"""

import argparse
import json

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from pyrannc.integrations.transformers import RaNNCTrainer


class Sentences(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Numbers that count up: the same on every process, nothing to download."""

    def __len__(self) -> int:
        """How many there are."""
        return 48

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Sixteen tokens; all but the first, which nothing precedes, are targets, too."""
        tokens = (torch.arange(16) * (index % 5 + 1) + index) % 50
        labels = tokens.clone()
        labels[0] = -100
        return {"input_ids": tokens, "labels": labels}


def main() -> None:
    """Trains, and writes the losses."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plain", action="store_true", help="train with the plain Trainer")
    parser.add_argument("--rows", type=int, default=4, help="rows of a batch on each process")
    parser.add_argument("--output", default="trained", help="folder of the trained model")
    options = parser.parse_args()
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    arguments = TrainingArguments(
        options.output,
        per_device_train_batch_size=options.rows,
        per_device_eval_batch_size=options.rows,
        num_train_epochs=2,
        learning_rate=1e-2,
        max_grad_norm=0.5,
        logging_steps=1,
        save_strategy="epoch",
        eval_strategy="epoch",
        report_to="none",
        use_cpu=True,
    )
    kind = Trainer if options.plain else RaNNCTrainer
    dataset = Sentences()
    trainer = kind(GPT2LMHeadModel(config), arguments, train_dataset=dataset, eval_dataset=dataset)
    trainer.train()
    trainer.save_model()
    if trainer.is_world_process_zero():
        names = ("loss", "grad_norm", "eval_loss")
        print(json.dumps([{n: e[n] for n in names if n in e} for e in trainer.state.log_history]))


if __name__ == "__main__":
    main()
