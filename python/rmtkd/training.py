"""Training on transformers' Trainer: seeded, silent, the same bits every time, and nothing left behind."""

import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from rmtkd import processes
from rmtkd.calibration import as_it_was, move_to
from rmtkd.config import Config
from rmtkd.errors import ModelError, TrainingError
from rmtkd.loss import IGNORED, distillation_loss

BATCH = 32  # examples, where a data set is given and not a loader: the paper's for text
LABELS = "labels"


def fit(
    student: nn.Module,
    teacher: nn.Module | None,
    train: Iterable[Mapping[str, Any]] | Dataset[Any],
    config: Config,
    *,
    epochs: int,
    label: str,
    evaluate: Callable[[nn.Module], float] | None = None,
    enough: float = float("inf"),
    after_step: Callable[[nn.Module], None] | None = None,
    progress: bool = True,
) -> nn.Module:
    """Trains the student in place, with AdamW and a learning rate that falls linearly.

    Gradients are clipped to norm 1 and neither biases nor the gains of norms decay: the Trainer's defaults.

    Args:
        student: trained where it is, and in eval mode afterwards.
        teacher: whose logits enter the loss with 1 − alpha; None leaves that term out.
        train: batches with "labels", see `distill`.
        config: learning rates, weight decay, alpha, temperature, seed.
        epochs: passes over `train`.
        label: of the progress bar.
        evaluate: score of a model, shown on the bar after each epoch; called in eval mode, without gradients.
        enough: training ends with the epoch after which the score is at least this.
        after_step: called with the student after each step of the optimiser.
        progress: whether to show a bar.

    Raises:
        TrainingError, ModelError: as `distill`.
    """
    batches = _batches(train)
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise ModelError("there is nothing to train: no parameter of the student requires a gradient")
    where = {parameter.device for parameter in student.parameters()}
    if len(where) > 1:
        raise ModelError(f"the student must be on one device, it is on {', '.join(map(str, where))}")
    if epochs:
        with (
            TemporaryDirectory(prefix="rmtkd-") as folder,
            seeded(config.seed, batches),
            _in_eval(teacher),
            _student(student),
            tqdm(total=epochs * len(batches), desc=label, disable=not (progress and processes.first())) as bar,
        ):
            arguments = _arguments(config, epochs, folder, cpu=where <= {torch.device("cpu")})
            calls = _Calls(bar, evaluate, enough, after_step)
            _Trainer(student, teacher, batches, config, arguments, calls).train()
    return student.eval()


def logits_of(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """A model's logits for a batch without its labels: what it returns, or the `logits` of that.

    Raises:
        ModelError: if it returns neither.
    """
    output = model(**{name: value for name, value in batch.items() if name != LABELS})
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise ModelError(
            f"{type(model).__name__} must return logits, as a tensor or in an attribute `logits`; "
            f"it returns {type(output).__name__}. Take the model's class with a head, e.g. AutoModelFor..."
        )
    return logits


def predicts_next(model: nn.Module) -> bool:
    """Whether the labels of a model are its inputs, one position later: a causal language model of transformers."""
    causal = getattr(model, "loss_type", None) == "ForCausalLM"
    return causal or type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def scored(model: nn.Module, evaluate: Callable[[nn.Module], float]) -> float:
    """What `evaluate` says of the model, in eval mode and without gradients; model and random state stay as they are.

    Raises:
        TrainingError: if that is no finite number.
    """
    with as_it_was(model):
        found = evaluate(model)
    try:
        score = float(found)
    except (TypeError, ValueError) as error:
        raise TrainingError(f"evaluate must return a number, got {type(found).__name__}") from error
    if not math.isfinite(score):
        raise TrainingError(f"evaluate must return a finite number, got {score}")
    return processes.agreed([score])[0]


@contextmanager
def seeded(seed: int, batches: Any) -> Iterator[None]:
    """Random numbers from this seed inside, also for a loader with generators of its own; the old states afterwards."""
    generators = _generators(batches)
    states = [generator.get_state() for generator in generators]
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        set_seed(seed)
        for generator in generators:
            generator.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)


@contextmanager
def _student(model: nn.Module) -> Iterator[None]:
    """Takes back what the Trainer does to a model besides training it."""
    device = next(model.parameters()).device
    config = getattr(model, "config", None)
    had = {} if config is None else {key: value for key, value in vars(config).items() if key == "use_cache"}
    try:
        yield
    finally:
        model.zero_grad()
        model.eval().to(device)
        if config is not None:
            vars(config).pop("use_cache", None)
            vars(config).update(had)


@contextmanager
def _in_eval(model: nn.Module | None) -> Iterator[None]:
    """Eval mode inside; afterwards every module's mode as before."""
    training = [] if model is None else [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


class _Trainer(Trainer):
    """Trainer with the loss of a distillation, its own schedule, and batches as they come from the user's loader."""

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        batches: Any,
        config: Config,
        arguments: TrainingArguments,
        calls: TrainerCallback,
    ) -> None:
        super().__init__(student, arguments, callbacks=[calls])
        self.pop_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = False  # the loss is ours, so nobody needs the labels counted
        self.batches, self.config, self.teacher = batches, config, teacher
        self.shift = predicts_next(student)

    def get_train_dataloader(self) -> Any:
        return self.batches

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LambdaLR:
        end = self.config.final_learning_rate / self.config.learning_rate
        last = max(num_training_steps - 1, 1)
        self.lr_scheduler = LambdaLR(
            optimizer or cast(Optimizer, self.optimizer), lambda step: 1 + (end - 1) * min(step / last, 1)
        )
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # counting them costs a walk over the parameters in each step

    def compute_loss(self, model: nn.Module, inputs: Any, *ignored: Any, **also_ignored: Any) -> Tensor:
        if not isinstance(inputs, Mapping) or not isinstance(inputs.get(LABELS), Tensor):
            raise TrainingError(f'batches must be mappings with a tensor "{LABELS}", got {_described(inputs)}')
        inputs = processes.part(inputs, LABELS, IGNORED)
        taught = None
        if self.teacher is not None and self.config.alpha < 1:
            device = next(self.teacher.parameters()).device
            with torch.no_grad():
                taught = logits_of(self.teacher, move_to(inputs, device)).to(self.args.device)
        loss = distillation_loss(
            logits_of(model, inputs),
            inputs[LABELS],
            taught,
            alpha=1.0 if self.teacher is None else self.config.alpha,
            temperature=self.config.temperature,
            shift=self.shift,
        )
        if not torch.isfinite(loss):
            raise TrainingError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1}: lower learning_rate, "
                "or look for inputs that are not finite"
            )
        labels = inputs[LABELS][..., 1:] if self.shift else inputs[LABELS]
        return loss * processes.share(int((labels != IGNORED).sum()))


class _Calls(TrainerCallback):
    """What happens between steps: the bar, the score after an epoch, and what the caller does after each step."""

    def __init__(
        self,
        bar: Any,
        evaluate: Callable[[nn.Module], float] | None,
        enough: float,
        after_step: Callable[[nn.Module], None] | None,
    ) -> None:
        self.bar, self.evaluate, self.enough, self.after_step = bar, evaluate, enough, after_step

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.bar.update()
        if self.after_step is not None:
            self.after_step(model)

    def on_epoch_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if self.evaluate is not None:
            score = scored(model, self.evaluate)
            self.bar.set_postfix_str(f"score {score:.4g}")
            control.should_training_stop = control.should_training_stop or score >= self.enough


def _arguments(config: Config, epochs: int, folder: str, *, cpu: bool) -> TrainingArguments:
    """One device per process, no files, no reports, no prints."""
    arguments = TrainingArguments(
        output_dir=folder,
        num_train_epochs=epochs,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        seed=config.seed,
        use_cpu=cpu,
        save_strategy="no",
        logging_strategy="no",
        eval_strategy="no",
        report_to=[],
        disable_tqdm=True,
        logging_nan_inf_filter=False,
        dataloader_pin_memory=False,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # else Trainer would spread batches over all visible GPUs
    return arguments


def _batches(train: Iterable[Mapping[str, Any]] | Dataset[Any]) -> Any:
    """A loader of the data set, or the batches as they are.

    Raises:
        TrainingError: if there are none, or nobody can say how many there are.
    """
    batches: Any = train
    if isinstance(train, Dataset):
        if not hasattr(train, "__len__"):
            raise TrainingError("the data set must have a length: the learning rate falls over a known number of steps")
        if len(train):
            batches = DataLoader(train, BATCH, shuffle=True, collate_fn=default_data_collator)
    try:
        count = len(batches)
    except TypeError as error:
        raise TrainingError(
            f"train must be a DataLoader, a Dataset or a list of batches, with a length; got {_described(train)}"
        ) from error
    if count == 0:
        raise TrainingError("there is nothing to train on: train is empty")
    return batches


def _generators(batches: Any) -> list[torch.Generator]:
    sampler, batch_sampler = getattr(batches, "sampler", None), getattr(batches, "batch_sampler", None)
    holders = (batches, sampler, batch_sampler, getattr(batch_sampler, "sampler", None))
    found = {id(generator): generator for holder in holders if (generator := getattr(holder, "generator", None))}
    return list(found.values())


def _described(found: object) -> str:
    if isinstance(found, Mapping):
        return f"a mapping of {', '.join(map(str, found))}"[:200]
    return type(found).__name__
