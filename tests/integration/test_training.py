"""EigenTrack around a training loop: the loss sees nothing of it, and it keeps nothing of the loss."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from eigentrack import EigenTrack
from tests.integration.conftest import tiny_llama
from tests.integration.test_monitor import WINDOW

pytest.importorskip("accelerate")
STEPS = 5


def rows() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 64, (12,), generator=generator) for _ in range(2 * STEPS)]
    return [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in ids]


def train(model: Any, folder: Path, checkpointing: bool, callbacks: Any = ()) -> list[float]:
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        seed=0,
        use_cpu=True,
        disable_tqdm=True,
        gradient_checkpointing=checkpointing,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows(), callbacks=list(callbacks))
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_training_is_bit_identical(tmp_path: Path, checkpointing: bool) -> None:
    plain, watched = tiny_llama(), tiny_llama()
    want = train(plain, tmp_path, checkpointing)
    with EigenTrack(watched, start="prompt", window=WINDOW) as track:
        losses = train(watched, tmp_path, checkpointing)
        steps, descriptors = track.steps, track.descriptors
    assert losses == want and len(losses) == STEPS
    for (name, one), (_, other) in zip(plain.named_parameters(), watched.named_parameters(), strict=True):
        assert torch.equal(one, other), name
        assert one.grad is None or torch.equal(one.grad, other.grad), name
    assert steps == 12 and descriptors.shape[0] == 2 and not descriptors.requires_grad


def test_nothing_piles_up(llama: Any, tmp_path: Path) -> None:
    from transformers import TrainerCallback

    alive: list[int] = []

    class Count(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            gc.collect()
            alive.append(sum(isinstance(thing, Tensor) for thing in gc.get_objects()))

    with EigenTrack(llama, start="prompt", window=WINDOW):
        train(llama, tmp_path, checkpointing=False, callbacks=[Count()])
    assert max(alive) <= alive[1], f"tensors after each step: {alive}"
