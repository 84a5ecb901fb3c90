"""The trainers people use on two processes, beside plain ones on one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

import pyrannc
from tests.covering import covering
from tests.gloo.layouts import config

if TYPE_CHECKING:
    from tests.gloo.pool import Pools

pytestmark = [pytest.mark.gloo, pytest.mark.timeout(150)]

ROOT = Path(__file__).parents[2]
# Two orders of additions in float32, over a dozen steps of Adam.
TOLERANCE = {"rtol": 2e-3, "atol": 2e-4}
SECONDS = 120  # the first function imports the trainer


def start(example: str, processes: int, output: Path) -> subprocess.Popen[str]:
    environment = os.environ | {
        "PYTHONPATH": str(ROOT / "python"),
        "OMP_NUM_THREADS": "1",
        "RANNC_PARTITION_NUM": "2",
        "RANNC_PIPELINE_NUM": "2",
        "RANNC_MEASURE": "false",
        "RANNC_TIMEOUT_S": "60",
    }
    launcher = [sys.executable]
    options = ["--rows", str(8 // processes), "--output", str(output)]
    if processes == 1:
        options.append("--plain")
    else:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, str(ROOT / "examples" / example), *options]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True)


def run_both(example: str, folder: Path) -> tuple[Any, Any]:
    """What the example prints on two processes and on one."""
    found = []
    for processes in (2, 1):
        child = start(example, processes, folder / str(processes))
        try:
            output, errors = child.communicate(timeout=100)
        finally:
            child.kill()
        assert child.returncode == 0, errors[-4000:]
        found.append(json.loads(output.splitlines()[-1]))
    return found[0], found[1]


@pytest.mark.slow
def test_hugging_face(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from safetensors.torch import load_file

    ours, theirs = run_both("trainer_hf.py", tmp_path)
    assert len(ours) == len(theirs)
    for entry, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(entry, expected, **TOLERANCE)
    for folder in ("", "checkpoint-6", "checkpoint-12"):
        saved, expected = (
            load_file(tmp_path / name / folder / "model.safetensors") for name in ("2", "1")
        )
        torch.testing.assert_close(saved, expected, **TOLERANCE)


def focus(
    outputs: dict[str, torch.Tensor], labels: torch.Tensor, num_items_in_batch: torch.Tensor
) -> torch.Tensor:
    """A focal loss, which the model does not know."""
    costs = torch.nn.functional.cross_entropy(
        outputs["logits"].flatten(0, 1), labels.flatten(), reduction="none"
    )
    return ((1 - torch.exp(-costs)).square() * costs).sum() / num_items_in_batch


OPTIONS: dict[str, dict[str, Any]] = {
    "alone": {},
    "accumulating": {"gradient_accumulation_steps": 2},
    "bfloat16": {"bf16": True, "gradient_accumulation_steps": 2},
    "best": {"load_best_model_at_end": True, "metric_for_best_model": "loss"},
    "smoothed": {"label_smoothing_factor": 0.1, "gradient_accumulation_steps": 2},
    "smoothed per batch": {
        "label_smoothing_factor": 0.1,
        "gradient_accumulation_steps": 2,
        "accepts_loss_kwargs": False,
    },
    "computed": {"gradient_accumulation_steps": 2, "compute_loss_func": focus},
}
"""Those of `TrainingArguments`, and of the model and the trainer."""


class Tagger(torch.nn.Module):
    """Predicts a tag for each word that has one; its loss is a mean as the trainer asks for."""

    def __init__(self, dtype: torch.dtype, accepts_loss_kwargs: bool = True) -> None:
        super().__init__()
        self.accepts_loss_kwargs = accepts_loss_kwargs
        self.config = types.SimpleNamespace(problem_type=None)  # which label smoothing looks at
        torch.manual_seed(0)
        layers = [torch.nn.Embedding(20, 8), torch.nn.Linear(8, 16), torch.nn.Tanh()]
        self.layers = torch.nn.Sequential(*layers, torch.nn.Linear(16, 5)).to(dtype)

    def forward(
        self,
        words: torch.Tensor,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        scores = self.layers(words)
        if labels is None:
            return {"logits": scores}
        reduction = "mean" if num_items_in_batch is None else "sum"
        loss = torch.nn.functional.cross_entropy(
            scores.flatten(0, 1), labels.flatten(), reduction=reduction
        )
        return {"loss": loss if num_items_in_batch is None else loss / num_items_in_batch}


class Tagged(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Rows with from none to all of their words tagged."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        words = (torch.arange(6) * (index + 1)) % 20
        return {"words": words, "labels": (words % 5).masked_fill(words % 7 < index % 5, -100)}


def tag(
    folder: Path, options: dict[str, Any], *, stages: int = 0, stop: int = 0, resume: bool = False
) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """Trains; what was logged, and rank 0's whole state in the end.

    Args:
        folder: where checkpoints are.
        options: one of `OPTIONS`.
        stages: of the model; 0 for a plain trainer.
        stop: how many steps to stop after; 0 for all.
        resume: whether to go on from the last checkpoint.
    """
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from pyrannc.integrations.transformers import RaNNCTrainer

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop |= state.global_step == stop

    options = dict(options)
    accepts = options.pop("accepts_loss_kwargs", True)
    outside = options.pop("compute_loss_func", None)
    rows = 4 // pyrannc.get_world_size()
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=rows,
        per_device_eval_batch_size=rows,
        num_train_epochs=2,
        learning_rate=1e-2,
        max_grad_norm=0.1,
        logging_steps=1,
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    model = Tagger(torch.float32 if "bf16" in options else torch.float64, accepts)
    settings = {"config": config(stages)} if stages else {}
    trainer = (RaNNCTrainer if stages else Trainer)(
        model,
        arguments,
        train_dataset=Tagged(),
        eval_dataset=Tagged(),
        compute_loss_func=outside,
        callbacks=[Stop],
        **settings,
    )
    history = [trainer.evaluate()]
    trainer.train(resume_from_checkpoint=resume)
    history += trainer.state.log_history
    state = trainer.model_wrapped.state_dict()
    pyrannc.clear()
    names = ("loss", "grad_norm", "eval_loss")
    logged = [{name: entry[name] for name in names if name in entry} for entry in history]
    return logged, {name: tensor.clone() for name, tensor in state.items()}


FIRST_WAYS = [("accumulating", 2, 2), ("computed", 1, 2)]
MORE_WAYS = covering(list(OPTIONS), [1, 2], [2, 4], besides=FIRST_WAYS)


@pytest.mark.parametrize(
    ("name", "stages", "world"),
    [*FIRST_WAYS, *MORE_WAYS],
)
def test_hugging_face_options(
    name: str, stages: int, world: int, pools: Pools, tmp_path: Path
) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    logged, state = tag(tmp_path / "plain", OPTIONS[name])
    train = partial(tag, tmp_path / "ours", OPTIONS[name], stages=stages)
    found, theirs = pools.run(world, train, seconds=SECONDS)[0]
    if name == "bfloat16":  # parts are rounded one by one, as in `test_precision.py`
        tolerance = {"rtol": 2**-7, "atol": 2**-7}
        torch.testing.assert_close(found, logged, **tolerance)
        torch.testing.assert_close(theirs, state, **tolerance)
        return
    torch.testing.assert_close(found, logged, rtol=1e-6, atol=0)  # it logs in float32
    torch.testing.assert_close(theirs, state, rtol=1e-10, atol=1e-12)


RESUMES = [
    ((2, 1), (2, 2)),
    ((2, 2), (1, 0)),
    ((1, 0), (2, 1)),
    ((1, 0), (4, 2)),
    ((4, 1), (2, 2)),
]
"""Processes and stages, of which 0 are a plain trainer, before and after the interruption."""


@pytest.mark.parametrize(("before", "after"), RESUMES, ids=str)
def test_hugging_face_resumes(
    before: tuple[int, int], after: tuple[int, int], pools: Pools, tmp_path: Path
) -> None:
    """By another plan, and from and to a plain trainer, as if it had never stopped."""
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    options = OPTIONS["accumulating"]
    _, state = tag(tmp_path / "plain", options)
    for (world, stages), more in ((before, {"stop": 3}), (after, {"resume": True})):
        train = partial(tag, tmp_path / "ours", options, stages=stages, **more)
        found = pools.run(world, train, seconds=SECONDS)[0] if stages else train()
    torch.testing.assert_close(found[1], state, rtol=1e-10, atol=1e-12)


def test_options_of_the_trainer_that_cannot_work(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from pyrannc.integrations.transformers import RaNNCTrainer

    arguments = transformers.TrainingArguments(
        str(tmp_path), use_cpu=True, report_to="none", torch_compile=True
    )
    with pytest.raises(pyrannc.RaNNCError, match="`torch_compile` cannot be used"):
        RaNNCTrainer(torch.nn.Linear(2, 2), arguments)


def ask_for(folder: Path, option: str) -> None:
    """What is refused beside `torch_compile`, of which one is not installed."""
    from transformers import TrainingArguments

    from pyrannc.integrations.transformers import RaNNCTrainer

    class Asked(RaNNCTrainer):
        def create_accelerator_and_postprocess(self) -> None:
            super().create_accelerator_and_postprocess()
            setattr(self, f"is_{option}_enabled", True)

    pyrannc.barrier()  # connects the processes
    settings = {"fsdp": True} if option == "fsdp" else {}
    arguments = TrainingArguments(str(folder), use_cpu=True, report_to="none", **settings)
    with pytest.raises(pyrannc.RaNNCError, match=rf"`{option}` cannot be used.*\n.*leave it out"):
        (RaNNCTrainer if settings else Asked)(torch.nn.Linear(2, 2), arguments)


@pytest.mark.parametrize("option", ["fsdp", "deepspeed"])
def test_other_ways_to_distribute_are_refused(option: str, pools: Pools, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    pools.run(2, ask_for, tmp_path, option, seconds=SECONDS)


def no_sum(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any) -> torch.Tensor:
    """A mean, whatever it is asked for."""
    return torch.nn.functional.cross_entropy(outputs["logits"].flatten(0, 1), labels.flatten())


@pytest.mark.parametrize("rows", [1, 4])
def test_losses_that_do_not_add_up_are_refused(rows: int) -> None:
    pytest.importorskip("transformers")
    from pyrannc.integrations._outside_losses import Computed

    outputs, labels = (
        Tagger(torch.float64)(torch.arange(3 * rows).view(rows, 3)),
        torch.ones(rows, 3).long(),
    )
    computed = Computed(no_sum, lambda values: values)
    with pytest.raises(pyrannc.RaNNCError, match=r"needed a sum over rows.*\n.*divide the sum"):
        computed(outputs, labels, num_items_in_batch=3 * rows)
    with pytest.raises(pyrannc.RaNNCError, match=r"not told what it is a mean over.*\n.*`labels`"):
        computed(outputs, None)
    added = Computed(focus, lambda values: 2 * values)(outputs, labels, num_items_in_batch=5)
    assert added.item() == pytest.approx(2 * focus(outputs, labels, 5).item(), rel=1e-12)


def test_a_trainer_refuses_losses_that_do_not_add_up(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    with pytest.raises(pyrannc.RaNNCError, match=r"needed a sum over rows.*\n.*divide the sum"):
        tag(tmp_path, {"compute_loss_func": no_sum}, stages=1)
    pyrannc.clear()


def regress(
    folder: Path,
    *,
    epochs: int,
    stages: int = 0,
    resume: bool = False,
    precision: str = "64-true",
    given: bool = True,
) -> dict[str, torch.Tensor]:
    """Trains with Lightning; the network's state in the checkpoint of the last epoch.

    Args:
        folder: where checkpoints are.
        epochs: how many, also those before the checkpoint.
        stages: of the network; 0 for a plain trainer.
        resume: whether to go on from the checkpoint.
        precision: of the trainer.
        given: whether the wrapped network is given its optimizer.
    """
    import lightning
    from lightning.fabric.plugins.environments import TorchElasticEnvironment
    from lightning.pytorch.callbacks import ModelCheckpoint
    from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

    from pyrannc.integrations.lightning import RaNNCStrategy

    class Regression(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            layers = [torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1)]
            self.network: torch.nn.Module = torch.nn.Sequential(*layers).to(dtype)

        def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
            return torch.nn.functional.mse_loss(self.network(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.Adam(self.network.parameters(), lr=1e-2)
            if stages:
                own = optimizer if given else None
                self.network = pyrannc.RaNNCModule(self.network, own, config=config(stages))
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]

    dtype = torch.float64 if precision == "64-true" else torch.float32
    world_size = pyrannc.get_world_size()
    x = torch.randn(24, 8, dtype=dtype, generator=torch.Generator().manual_seed(1))
    data = TensorDataset(x, x.sum(1, keepdim=True))
    sampler = DistributedSampler(data, world_size, pyrannc.get_rank(), shuffle=False)
    distributed = {"strategy": RaNNCStrategy(), "plugins": [TorchElasticEnvironment()]}
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=world_size,
        max_epochs=epochs,
        precision=precision,
        gradient_clip_val=0.5,
        accumulate_grad_batches=2,
        callbacks=[ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **(distributed if stages else {}),
    )
    checkpoint = folder / f"epoch={epochs - 2}.ckpt" if resume else None
    loader = DataLoader(data, batch_size=4 // world_size, sampler=sampler)
    trainer.fit(Regression(), loader, ckpt_path=checkpoint)
    return torch.load(folder / f"epoch={epochs - 1}.ckpt", weights_only=True)["state_dict"]


def run(pools: Pools, world: int, stages: int, folder: Path, **options: Any) -> Any:
    """Trains with Lightning on so many processes, or plainly on this one."""
    work = partial(regress, folder, stages=stages, **options)
    return pools.run(world, work, seconds=SECONDS)[0] if stages else work()


@pytest.mark.filterwarnings("ignore::UserWarning")  # that the folder has changed
@pytest.mark.filterwarnings("ignore::FutureWarning")  # of Lightning's own calls of PyTorch
@pytest.mark.parametrize(("before", "after"), RESUMES, ids=str)
def test_lightning_resumes(
    before: tuple[int, int], after: tuple[int, int], pools: Pools, tmp_path: Path
) -> None:
    """By another plan, and from and to a plain trainer, as if it had never stopped."""
    pytest.importorskip("lightning")
    state = regress(tmp_path / "plain", epochs=2)
    run(pools, *before, tmp_path / "ours", epochs=1)
    found = run(pools, *after, tmp_path / "ours", epochs=2, resume=True)
    torch.testing.assert_close(found, state, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("world", "stages"),
    [(2, 2), (4, 1)],
    ids=str,
)
def test_lightning_in_bfloat16(world: int, stages: int, pools: Pools, tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    options = {"epochs": 2, "precision": "bf16-mixed"}
    state = run(pools, 1, 0, tmp_path / "plain", **options)
    exact = run(pools, 1, 0, tmp_path / "exact", epochs=2, precision="32-true")
    found = run(pools, world, stages, tmp_path / "ours", **options)
    assert any(not torch.equal(state[name], exact[name]) for name in state)  # it is not ignored
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    # Parts are rounded one by one, as in `test_precision.py`; six steps of Adam follow signs.
    torch.testing.assert_close(found, state, rtol=2**-7, atol=2**-7)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_lightning_with_an_optimizer_that_nobody_was_given(pools: Pools, tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    work = partial(regress, tmp_path, epochs=1, stages=1, given=False)
    for outcome in pools.outcomes(2, work, seconds=SECONDS):
        assert outcome.kind == "RaNNCError"
        assert "returned an optimizer that no RaNNCModule was given" in outcome.message
        assert "RaNNCModule(self.network, optimizer)" in outcome.message


@pytest.mark.slow
def test_lightning(tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    ours, theirs = run_both("trainer_lightning.py", tmp_path)
    assert len(ours["losses"]) == 12
    for name in ("losses", "validation", "saved"):
        torch.testing.assert_close(ours[name], theirs[name], **TOLERANCE)
