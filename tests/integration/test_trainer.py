"""Spectra in a Trainer's logs: the right ones, at the right steps, and training stays as it was."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from eigentrack import EigenTrackError, TapError
from eigentrack.options import FEW
from eigentrack.taps import find_blocks
from eigentrack.trainer import SpectraCallback
from rmtkernels import DESCRIPTORS
from tests.integration.conftest import tiny_llama
from tests.integration.test_monitor import hooks_of

STEPS, LENGTH = 4, 9


def texts() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for index in range(2 * STEPS):
        ids = torch.randint(3, 60, (LENGTH,), generator=generator)
        mask = (torch.arange(LENGTH) < LENGTH - index % 3).long()
        found.append({"input_ids": ids, "attention_mask": mask, "labels": ids.where(mask.bool(), -100)})
    return found


def trainer(folder: Path, model: Any, **given: Any) -> Trainer:
    options: dict[str, Any] = {"logging_steps": 2, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    options |= {"max_steps": STEPS, "per_device_train_batch_size": 2, "use_cpu": True}
    arguments = TrainingArguments(str(folder), **{**options, **given})
    return Trainer(model, arguments, train_dataset=texts())


def logged(done: Trainer) -> dict[int, dict[str, float]]:
    """Per step, the descriptors."""
    found: dict[int, dict[str, float]] = {}
    for entry in done.state.log_history:
        values = {name: value for name, value in entry.items() if name.startswith("spectra/")}
        if values:
            assert entry["step"] not in found, "logged twice"
            found[entry["step"]] = values
    return found


class Seen:
    """What each forward pass showed: hidden states by layer, and which tokens were no padding."""

    def __init__(self, model: Any) -> None:
        self.passes: list[tuple[torch.Tensor, dict[int, torch.Tensor]]] = []
        model.register_forward_pre_hook(self._begin, with_kwargs=True)
        for index, block in enumerate(find_blocks(model)):
            block.register_forward_hook(self._hook(index))

    def _begin(self, module: Any, args: Any, kwargs: Any) -> None:
        self.passes.append((kwargs["attention_mask"].bool(), {}))

    def _hook(self, index: int) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            self.passes[-1][1].setdefault(index, output.detach().double())

        return hook


def entropy(rows: torch.Tensor) -> float:
    rows = rows / rows.square().mean(1, keepdim=True).sqrt()
    shares = torch.linalg.svdvals(rows - rows.mean(0)).square()
    return float(torch.special.entr(shares / shares.sum()).sum())


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_spectra_are_those_of_the_step(tmp_path: Path, accumulate: int, checkpointing: bool) -> None:
    model = tiny_llama()
    seen = Seen(model)
    if checkpointing:
        model.gradient_checkpointing_enable()
    hooks = hooks_of(model)
    done = trainer(tmp_path, model, gradient_accumulation_steps=accumulate, max_steps=2)
    done.add_callback(SpectraCallback(done, [1, 4], window=7))
    done.train()
    [(step, values)] = logged(done).items()
    assert step == 2 and set(values) == {f"spectra/layer{layer}.{name}" for layer in (1, 4) for name in FEW}
    mask, states = seen.passes[accumulate]  # the second step's first batch
    count = int(mask.sum())
    for layer in (1, 4):
        rows = states[layer][mask][torch.arange(7) * count // 7]
        assert values[f"spectra/layer{layer}.entropy"] == pytest.approx(entropy(rows), rel=1e-5)
    assert hooks_of(model) == hooks, "hooks of the callback are left"


@pytest.mark.parametrize(("every", "wanted"), [(None, [2, 4]), (1, [1, 2, 3, 4]), (3, [3])])
def test_every_so_many_steps(tmp_path: Path, every: int | None, wanted: list[int]) -> None:
    done = trainer(tmp_path, tiny_llama(depth=2))
    done.add_callback(SpectraCallback(done, "all", descriptors=["mp_kl"], every=every))
    done.train()
    assert list(logged(done)) == wanted
    assert all(set(values) == {"spectra/layer0.mp_kl", "spectra/layer1.mp_kl"} for values in logged(done).values())


def test_training_is_not_changed_by_a_bit(tmp_path: Path) -> None:
    states = []
    for watched in (False, True):
        done = trainer(tmp_path, tiny_llama(depth=2), seed=1)
        if watched:
            done.add_callback(SpectraCallback(done, every=1))
        done.train()
        states.append(done.model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_an_event_file_holds_them(tmp_path: Path) -> None:
    pytest.importorskip("torch.utils.tensorboard", reason="needs tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    done = trainer(tmp_path, tiny_llama(depth=2), report_to="tensorboard")
    done.add_callback(SpectraCallback(done, [1]))
    done.train()
    [file] = tmp_path.rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file))
    events.Reload()
    read = {event.step: event.value for event in events.Scalars("train/spectra/layer1.entropy")}
    assert read == pytest.approx({step: values["spectra/layer1.entropy"] for step, values in logged(done).items()})
    assert sorted(read) == [2, 4]


def test_what_cannot_be(tmp_path: Path) -> None:
    done = trainer(tmp_path, tiny_llama(depth=2))
    for given in (
        {"window": 0},
        {"window": 129},
        {"every": 0},
        {"descriptors": ["entropie"]},
        {"descriptors": "entropy"},
    ):
        with pytest.raises(EigenTrackError):
            SpectraCallback(done, **given)  # type: ignore[arg-type]
    with pytest.raises(TapError):
        SpectraCallback(done, [7])
    assert hooks_of(done.model) == 0 and len(DESCRIPTORS) > len(FEW)
    compiled = trainer(tmp_path, tiny_llama(depth=2), torch_compile=True, torch_compile_backend="eager")
    compiled.add_callback(SpectraCallback(compiled))
    with pytest.raises(EigenTrackError, match="compiled"):
        compiled.train()
    assert hooks_of(compiled.model) == 0
