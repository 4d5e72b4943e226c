"""Distillation: its loss against NumPy, its training against a bare loop, and what it must leave alone."""

import copy
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from rmtkd.config import Config
from rmtkd.distillation import distill, train
from rmtkd.errors import ConfigError, ModelError, TrainingError
from rmtkd.loss import distillation_loss
from rmtkd.training import fit, predicts_next

VOCABULARY, WIDTH = 32, 16


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def bert(seed: int = 0, kind: Any = BertForSequenceClassification, **changes: Any) -> Any:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        num_labels=3,
        **changes,
    )
    return kind(config).eval()


def llama(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return LlamaForCausalLM(config).eval()


def sentences(count: int = 6, rows: int = 4, length: int = 7) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "input_ids": torch.randint(0, VOCABULARY, (rows, length), generator=generator),
            "labels": torch.randint(0, 3, (rows,), generator=generator),
        }
        for _ in range(count)
    ]


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def random_states(loader: DataLoader[Any]) -> list[Any]:
    numpy = np.random.get_state()[1].tolist()  # type: ignore[index, union-attr]
    return [torch.get_rng_state().tolist(), random.getstate(), numpy, loader.generator.get_state().tolist()]


class Plain(nn.Module):
    """A module of PyTorch alone, that returns a tensor."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.inner, self.outer, self.dropout = nn.Linear(5, 8), nn.Linear(8, 3), nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.dropout(self.inner(x).relu()))


def points(count: int = 5, rows: int = 8) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [
        {
            "x": torch.randn(rows, 5, generator=generator),
            "labels": torch.randint(0, 3, (rows,), generator=generator),
        }
        for _ in range(count)
    ]


# --- the loss


def softmax(logits: Any) -> Any:
    exponents = np.exp(logits - logits.max(-1, keepdims=True))
    return exponents / exponents.sum(-1, keepdims=True)


def oracle(student: Any, labels: Any, teacher: Any, alpha: float, temperature: float, shift: bool) -> float:
    """Row by row, in float64, from the formula."""
    if shift:
        student, teacher, labels = student[:, :-1], teacher[:, :-1], labels[:, 1:]
    terms = []
    for row in np.ndindex(labels.shape):
        if labels[row] == -100:
            continue
        cross = -np.log(softmax(student[row])[labels[row]])
        taught, learnt = softmax(teacher[row] / temperature), softmax(student[row] / temperature)
        divergence = (taught * np.log(taught / learnt)).sum()
        terms.append(alpha * cross + (1 - alpha) * temperature**2 * divergence)
    return float(np.mean(terms))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize(("shape", "shift"), [((9,), False), ((3, 7), False), ((3, 7), True)])
def test_the_loss_is_the_formula(alpha: float, temperature: float, shape: tuple[int, ...], shift: bool) -> None:
    generator = np.random.default_rng(0)
    student, teacher = generator.normal(0, 3, (2, *shape, 5))
    labels = generator.integers(0, 5, shape)
    labels.flat[::3] = -100
    found = distillation_loss(
        torch.tensor(student),
        torch.tensor(labels),
        torch.tensor(teacher),
        alpha=alpha,
        temperature=temperature,
        shift=shift,
    )
    assert found.dtype == torch.float64
    assert found.item() == pytest.approx(oracle(student, labels, teacher, alpha, temperature, shift), rel=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_gradient_of_the_divergence_is_t_times_the_difference_of_the_softmaxes(temperature: float) -> None:
    torch.manual_seed(0)
    student = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(6, 4, dtype=torch.float64)
    labels = torch.tensor([0, 1, -100, 3, 2, 1])
    distillation_loss(student, labels, teacher, alpha=0.25, temperature=temperature).backward()  # type: ignore[no-untyped-call]
    cross = student.detach().softmax(-1) - nn.functional.one_hot(labels.clamp(min=0), 4)
    divergence = temperature * ((student.detach() / temperature).softmax(-1) - (teacher / temperature).softmax(-1))
    wanted = (0.25 * cross + 0.75 * divergence) / 5
    wanted[2] = 0
    torch.testing.assert_close(student.grad, wanted, rtol=1e-12, atol=1e-14)


def test_a_student_equal_to_its_teacher_has_no_divergence() -> None:
    logits = torch.randn(8, 5, dtype=torch.float64)
    labels = torch.zeros(8, dtype=torch.long)
    assert distillation_loss(logits, labels, logits, alpha=0, temperature=2).item() == pytest.approx(0, abs=1e-14)


def test_a_batch_without_labels_costs_nothing() -> None:
    logits = torch.randn(4, 3, requires_grad=True)
    loss = distillation_loss(logits, torch.full((4,), -100), torch.randn(4, 3))
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == 0 and logits.grad is not None and not logits.grad.any()


def test_half_precision_is_summed_in_single() -> None:
    logits = torch.randn(512, 50)
    half = logits.bfloat16()
    labels = torch.zeros(512, dtype=torch.long)
    found = distillation_loss(half, labels, half.flip(0))
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(distillation_loss(half.float(), labels, half.float().flip(0)).item(), rel=1e-6)


@pytest.mark.parametrize(
    ("labels", "teacher", "message"),
    [
        (torch.zeros(3), None, "class indices"),
        (torch.zeros(4, 1, dtype=torch.long), None, "class indices of shape \\(4,\\)"),
        (torch.full((4,), 3), None, "from 0 to 2"),
        (torch.full((4,), -1), None, "from 0 to 2"),
        (torch.zeros(4, dtype=torch.long), torch.zeros(4, 2), "teacher's logits are \\(4, 2\\)"),
    ],
)
def test_shapes_and_labels_that_do_not_fit_are_refused(labels: Tensor, teacher: Tensor | None, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        distillation_loss(torch.zeros(4, 3), labels, teacher)


def test_who_predicts_the_next_token() -> None:
    tiny = {"vocab_size": 8, "n_embd": 4, "n_layer": 1, "n_head": 1, "n_positions": 4}
    assert predicts_next(llama()) and predicts_next(GPT2LMHeadModel(GPT2Config(**tiny)))
    assert not predicts_next(bert()) and not predicts_next(bert(kind=BertForTokenClassification))
    assert not predicts_next(Plain())


# --- training


def bare_loop(student: nn.Module, teacher: nn.Module, batches: Any, config: Config, epochs: int, shift: bool) -> None:
    """What `distill` promises, written out."""
    decayed, others = [], []
    for name, parameter in student.named_parameters():
        (others if "bias" in name or "norm" in name.lower() else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate)
    steps, step = epochs * len(batches), 0
    student.train()
    for _ in range(epochs):
        for batch in batches:
            for group in optimizer.param_groups:
                share = step / (steps - 1)
                group["lr"] = (1 - share) * config.learning_rate + share * config.final_learning_rate
            inputs = {name: value for name, value in batch.items() if name != "labels"}
            with torch.no_grad():
                taught = teacher(**inputs)
            learnt, labels = student(**inputs), batch["labels"]
            if not isinstance(taught, Tensor):
                taught, learnt = taught.logits, learnt.logits
            if shift:
                taught, learnt, labels = taught[:, :-1], learnt[:, :-1], labels[:, 1:]
            T = config.temperature
            cross = nn.functional.cross_entropy(learnt.flatten(0, -2), labels.flatten())
            kept = labels.flatten() != -100
            targets = (taught / T).log_softmax(-1).flatten(0, -2)[kept]
            divergence = nn.functional.kl_div(
                (learnt / T).log_softmax(-1).flatten(0, -2)[kept], targets, reduction="batchmean", log_target=True
            )
            optimizer.zero_grad()
            (config.alpha * cross + (1 - config.alpha) * T**2 * divergence).backward()
            nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            step += 1
    student.eval()


def tokens() -> list[dict[str, Tensor]]:
    batches = []
    for batch in sentences():
        labels = batch["input_ids"].clone()
        labels[0, 4:] = -100
        batches.append({"input_ids": batch["input_ids"], "labels": labels})
    return batches


@pytest.mark.parametrize("kind", ["encoder", "language model"])
def test_training_is_the_bare_loop(kind: str) -> None:
    config = Config(
        epochs=3, learning_rate=1e-2, final_learning_rate=1e-3, temperature=2.0, alpha=0.4, weight_decay=0.1
    )
    if kind == "encoder":
        quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        student, teacher, batches = bert(0, **quiet), bert(1, **quiet), sentences()
    else:
        student, teacher, batches = llama(0), llama(1), tokens()
    wanted = copy.deepcopy(student)
    start = bits(student)
    bare_loop(wanted, teacher, batches, config, 3, shift=kind != "encoder")
    assert distill(student, teacher, batches, config, progress=False) is student
    for name, tensor in wanted.state_dict().items():
        torch.testing.assert_close(student.state_dict()[name], tensor, rtol=1e-3, atol=2e-5, msg=name)
    assert not same(start, bits(student)) and not student.training


def test_the_learning_rate_falls_linearly_and_ends_where_it_should(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = []
    step = torch.optim.AdamW.step

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    distill(
        Plain(0), Plain(1), points(), Config(epochs=2, learning_rate=3e-3, final_learning_rate=1e-3), progress=False
    )
    np.testing.assert_allclose(rates, np.linspace(3e-3, 1e-3, 10), rtol=1e-12)


def test_one_step_takes_the_first_learning_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    student = Plain(0)
    before = student.outer.bias.detach().clone()
    distill(student, Plain(1), points(1), Config(epochs=1, learning_rate=1e-2, final_learning_rate=0), progress=False)
    # Adam's first step is the learning rate, whatever the gradient
    torch.testing.assert_close((student.outer.bias - before).abs(), torch.full((3,), 1e-2), rtol=1e-3, atol=0)


def test_equal_runs_are_equal_to_the_bit_and_leave_random_states_alone() -> None:
    data = [{"x": batch["x"][i], "labels": batch["labels"][i]} for batch in points() for i in range(8)]
    teacher, config = Plain(1), Config(epochs=2, seed=3, learning_rate=1e-2)
    own = DataLoader(data, 4, shuffle=True, generator=torch.Generator().manual_seed(7))  # type: ignore[arg-type]
    global_states = DataLoader(data, 4, shuffle=True)  # type: ignore[arg-type]
    results = []
    for loader in (own, own, global_states, global_states):
        student = Plain(0)
        torch.manual_seed(len(results))
        random.seed(len(results))
        np.random.seed(len(results))
        states = random_states(own)
        results.append(bits(distill(student, teacher, loader, config, progress=False)))
        assert random_states(own) == states
    assert same(results[2], results[3])
    other = DataLoader(data, 4, shuffle=True, generator=torch.Generator().manual_seed(8))  # type: ignore[arg-type]
    assert same(results[0], bits(distill(Plain(0), teacher, other, config, progress=False)))
    assert same(results[0], results[1])
    assert not same(results[0], bits(distill(Plain(0), teacher, own, replace(config, seed=4), progress=False)))


def test_neither_the_teacher_nor_anything_else_changes() -> None:
    teacher, student = bert(1), bert(0)
    teacher.train()
    teacher.bert.encoder.layer[0].eval()
    modes = [module.training for module in teacher.modules()]
    teacher_bits, settings = bits(teacher), (teacher.config.to_dict(), student.config.to_dict())
    distill(student, teacher, sentences(), Config(epochs=1, learning_rate=1e-2), progress=False)
    assert same(teacher_bits, bits(teacher)) and modes == [module.training for module in teacher.modules()]
    assert all(parameter.grad is None for model in (teacher, student) for parameter in model.parameters())
    assert settings == (teacher.config.to_dict(), student.config.to_dict())


def test_the_teacher_runs_without_dropout() -> None:
    config = Config(epochs=1, alpha=0, learning_rate=1e-3)
    results = []
    for mode in (True, False):
        teacher = Plain(1).train(mode)
        results.append(bits(distill(Plain(0), teacher, points(), config, progress=False)))
    assert same(*results)


def test_alpha_one_is_training_without_a_teacher() -> None:
    config = Config(epochs=2, alpha=1.0, learning_rate=1e-2)
    alone = bits(train(Plain(0), points(), replace(config, alpha=0.3), progress=False))
    assert same(alone, bits(distill(Plain(0), None, points(), config, progress=False)))
    assert same(alone, bits(distill(Plain(0), Plain(1), points(), config, progress=False)))
    with pytest.raises(ConfigError, match=r"alpha must be 1, got 0\.7"):
        distill(Plain(0), None, points(), Config(), progress=False)


def test_frozen_parameters_stay() -> None:
    student = Plain(0)
    student.inner.weight.requires_grad_(False)
    before = bits(student)
    distill(student, Plain(1), points(), Config(epochs=1, learning_rate=1e-2), progress=False)
    assert torch.equal(student.inner.weight, before["inner.weight"])
    assert not torch.equal(student.inner.bias, before["inner.bias"])


def test_no_epochs_change_nothing() -> None:
    student = Plain(0).train()
    before = bits(student)
    assert not distill(student, Plain(1), points(), Config(epochs=0), progress=False).training
    assert same(before, bits(student))


def test_a_data_set_is_drawn_in_batches_of_32_in_random_order() -> None:
    class Numbers(torch.utils.data.Dataset[dict[str, Tensor]]):
        def __len__(self) -> int:
            return 70

        def __getitem__(self, index: int) -> dict[str, Tensor]:
            return {"x": torch.full((5,), float(index)), "labels": torch.tensor(index % 3)}

    seen: list[list[float]] = []

    class Watching(Plain):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x[:, 0].tolist())
            return super().forward(x)

    train(Watching(), Numbers(), Config(epochs=2, learning_rate=1e-6), progress=False)
    assert [len(rows) for rows in seen] == [32, 32, 6] * 2
    epochs = [[*chain(*seen[:3])], [*chain(*seen[3:])]]
    assert all(sorted(epoch) == list(range(70)) != epoch for epoch in epochs) and epochs[0] != epochs[1]


def test_training_ends_when_the_score_is_enough() -> None:
    scores = iter([0.1, 0.6, 0.9])
    steps = []
    fit(
        Plain(),
        None,
        points(),
        Config(),
        epochs=3,
        label="",
        evaluate=lambda _: next(scores),
        enough=0.6,
        after_step=lambda _: steps.append(1),
        progress=False,
    )
    assert len(steps) == 10 and next(scores) == 0.9


# --- what a user sees, and what is refused


def test_nothing_is_printed_and_no_file_is_left(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    distill(bert(0), bert(1), sentences(), Config(epochs=1), evaluate=lambda _: 0.5, progress=False)
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []


def test_a_bar_shows_steps_and_scores(capfd: pytest.CaptureFixture[str]) -> None:
    distill(Plain(0), Plain(1), points(), Config(epochs=2), evaluate=lambda _: 0.875)
    out, err = capfd.readouterr()
    assert out == "" and "10/10" in err and "score 0.875" in err


def test_evaluate_sees_the_model_in_eval_mode_without_gradients_and_may_fail() -> None:
    seen = []

    def evaluate(model: nn.Module) -> float:
        seen.append((model.training, torch.is_grad_enabled()))
        if len(seen) == 2:
            raise KeyError("mine")
        return 0.5

    student, teacher = Plain(0), Plain(1).train()
    state = torch.get_rng_state()
    with pytest.raises(KeyError, match="mine"):
        distill(student, teacher, points(), Config(epochs=3), evaluate=evaluate, progress=False)
    assert seen == [(False, False)] * 2
    assert teacher.training and not student.training and torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None, "good"])
def test_a_score_must_be_a_finite_number(value: Any) -> None:
    with pytest.raises(TrainingError, match="evaluate must return a"):
        distill(Plain(0), Plain(1), points(), Config(epochs=1), evaluate=lambda _: value, progress=False)


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield points(1)[0]


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "nothing to train on"),
        (iter(points()), "with a length"),
        (Endless(), "must have a length"),
        ([{"x": torch.zeros(2, 5)}], 'tensor "labels", got a mapping of x'),
        ([(torch.zeros(2, 5), torch.zeros(2))], 'tensor "labels", got tuple'),
        ([{"x": torch.zeros(2, 5), "labels": torch.zeros(2)}], "class indices"),
        ([{"x": torch.full((2, 5), torch.nan), "labels": torch.zeros(2, dtype=torch.long)}], "loss is nan at step 1"),
    ],
)
def test_data_that_cannot_be_trained_on_is_refused(batches: Any, message: str) -> None:
    student = Plain(0)
    before = bits(student)
    with pytest.raises(TrainingError, match=message):
        distill(student, Plain(1), batches, Config(epochs=1), progress=False)
    assert same(before, bits(student))


def test_models_that_cannot_be_trained_are_refused() -> None:
    student = Plain(0)
    with pytest.raises(ModelError, match="shares parameters"):
        distill(student, student, points(), Config(), progress=False)
    frozen = Plain(0).requires_grad_(False)
    with pytest.raises(ModelError, match="nothing to train"):
        distill(frozen, Plain(1), points(), Config(), progress=False)
    with pytest.raises(ModelError, match=r"BertModel must return logits.*AutoModelFor"):
        distill(bert().bert, bert(1), sentences(), Config(epochs=1), progress=False)


def test_a_learning_rate_that_is_too_high_is_named() -> None:
    explode: Callable[[nn.Module], None] = lambda model: [p.data.mul_(1e30) for p in model.parameters()]  # type: ignore[func-returns-value]  # noqa: E731
    with pytest.raises(TrainingError, match="at step 2: lower learning_rate"):
        fit(Plain(), None, points(), Config(), epochs=1, label="", after_step=explode, progress=False)
