"""The staged loop: what each stage is given, every rule that stops it, and its checkpoints."""

import copy
import gc
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from rmtkd import checkpoints, files, stages
from rmtkd.config import Config
from rmtkd.errors import CalibrationError, FileFormatError, ModelError, ResumeError
from rmtkd.modules import Projected
from rmtkd.stages import Result, run

FACTOR = Config(
    mode="factor",
    keep_slower=True,
    quantile=0.7,
    multiple=1,
    min_ratio=0.0,
    max_drop=1.0,
    stages=2,
    epochs=1,
    learning_rate=1e-2,
    warm_up_epochs=3,
)
WIDTH = replace(FACTOR, mode="width", quantile=0.45, multiple=4)


@pytest.fixture(scope="module", autouse=True)
def little_garbage() -> Iterator[None]:
    """The Trainer collects garbage whenever it starts; what is imported is none."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Net(nn.Module):
    """Its layers run in another order than they are registered in."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.third, self.first, self.fourth, self.second = (nn.Linear(16, 16) for _ in range(4))
        self.unused = nn.Linear(16, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.first, self.second, self.third, self.fourth):
            x = layer(x).tanh()
        logits: Tensor = self.head(x)
        return logits


def points(count: int = 4, rows: int = 32) -> list[dict[str, Tensor]]:
    """Three dimensions of signal, sixteen of noise."""
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(3, 16, generator=generator)
    batches = []
    for _ in range(count):
        signal = torch.randn(rows, 3, generator=generator)
        x = signal @ mixing + 0.1 * torch.randn(rows, 16, generator=generator)
        batches.append({"x": x, "labels": signal.argmax(1)})
    return batches


BATCHES = points()
CALIBRATION = [{"x": batch["x"]} for batch in BATCHES]


def accuracy(model: nn.Module) -> float:
    return float(torch.cat([model(batch["x"]).argmax(-1) == batch["labels"] for batch in BATCHES]).float().mean())


def bert() -> Any:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=32,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=16,
        num_labels=3,
    )
    return BertForSequenceClassification(config).eval()


def sentences() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 32, (4, 16, 8), generator=generator)
    return [{"input_ids": ids, "labels": ids[:, 0] % 3} for ids in tokens]


def sentence_accuracy(model: nn.Module) -> float:
    found = [model(batch["input_ids"]).logits.argmax(-1) == batch["labels"] for batch in sentences()]
    return float(torch.cat(found).float().mean())


def narrow(config: Config = WIDTH, evaluate: Callable[[nn.Module], float] = sentence_accuracy, **more: Any) -> Result:
    batches = sentences()
    calibration = [{"input_ids": batch["input_ids"]} for batch in batches]
    return run(bert(), calibration, batches, evaluate, config, progress=False, **more)


def project(config: Config = FACTOR, evaluate: Callable[[nn.Module], float] = accuracy, **more: Any) -> Result:
    return run(Net(), CALIBRATION, BATCHES, evaluate, config, progress=False, **more)


def scores(*values: float) -> Callable[[nn.Module], float]:
    """An evaluation that says these, one after the other."""
    told = iter(values)
    return lambda model: next(told)


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(first: nn.Module, second: nn.Module) -> bool:
    one, other = first.state_dict(), second.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def projected(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, Projected)]


# --- what a stage does


def test_width_mode_narrows_the_whole_network_in_every_stage() -> None:
    result = narrow()
    assert [stage.number for stage in result.history] == [0, 1, 2] and result.reason == "all 2 stages are done"
    start, first, second = result.history
    assert start.kept == 1 and start.ranks == {} and start.before == start.score == first.before
    assert first.score == second.before and not second.undone
    assert start.parameters > first.parameters > second.parameters == size(result.model)
    assert second.kept == second.parameters / start.parameters
    widths = result.model.config.hidden_size, result.model.config.intermediate_size
    assert second.ranks == {"hidden_size": widths[0], "intermediate_size": widths[1]}
    assert first.ranks["hidden_size"] > widths[0]
    assert second.score == sentence_accuracy(result.model) and not result.model.training
    assert len(result.table().splitlines()) == 5 and result.table().endswith(result.reason)


def test_factor_mode_goes_from_shallow_to_deep_in_the_order_of_execution() -> None:
    result = project(replace(FACTOR, modules=("*", "!head")))
    assert [list(stage.ranks) for stage in result.history] == [[], ["second", "first"], ["third", "fourth"]] or [
        sorted(stage.ranks) for stage in result.history
    ] == [[], ["first", "second"], ["fourth", "third"]]
    assert sorted(projected(result.model)) == ["first", "fourth", "second", "third"]
    assert all(isinstance(rank, int) and rank < 16 for stage in result.history for rank in stage.ranks.values())


@pytest.mark.parametrize(("wanted", "slices"), [(1, [3]), (2, [2, 1]), (3, [1, 1, 1]), (9, [1, 1, 1])])
def test_stages_take_equal_slices(wanted: int, slices: list[int]) -> None:
    result = project(replace(FACTOR, stages=wanted, modules=("first", "second", "third")))
    assert [len(stage.ranks) for stage in result.history[1:]] == slices
    assert result.reason == f"all {len(slices)} stages are done"


def test_each_stage_calibrates_on_the_current_model_and_learns_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    planned, taught = [], []
    plan, fit = stages.plan, stages.fit

    def watched_plan(model: nn.Module, *arguments: Any, **more: Any) -> Any:
        planned.append((model, bits(model)))
        return plan(model, *arguments, **more)

    def watched_fit(student: nn.Module, teacher: nn.Module, train: Any, config: Config, **more: Any) -> Any:
        taught.append((student, teacher, config.seed))
        return fit(student, teacher, train, config, **more)

    monkeypatch.setattr(stages, "plan", watched_plan)
    monkeypatch.setattr(stages, "fit", watched_fit)
    result = project(replace(FACTOR, seed=5))
    (first, before), (second, between) = planned
    assert taught == [(second, first, 6), (result.model, second, 7)]
    assert all(torch.equal(tensor, before[name]) for name, tensor in Net().state_dict().items())
    assert all(torch.equal(tensor, between[name]) for name, tensor in second.state_dict().items())


@pytest.mark.parametrize("mode", ["width", "factor"])
def test_the_model_given_stays_as_it_is_and_equal_runs_are_equal(mode: str) -> None:
    model = bert() if mode == "width" else Net()
    batches = sentences() if mode == "width" else BATCHES
    name, evaluate = ("input_ids", sentence_accuracy) if mode == "width" else ("x", accuracy)
    calibration = torch.utils.data.DataLoader(torch.cat([batch[name] for batch in batches]), 16, shuffle=True)  # type: ignore[arg-type]
    before, results = copy.deepcopy(model.train()), []
    for _ in range(2):
        config = WIDTH if mode == "width" else FACTOR
        results.append(run(model, calibration, batches, evaluate, replace(config, baseline=1.0), progress=False))
        torch.rand(1)
    assert same(model, before) and model.training
    assert same(results[0].model, results[1].model) and results[0].history == results[1].history
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in results[0].model.parameters()}


# --- warming up


def test_warming_up_ends_at_its_share_of_the_baseline() -> None:
    config = replace(FACTOR, baseline=0.8, warm_up=0.5, stages=1, warm_up_epochs=5)
    told = scores(0.1, 0.3, 0.4, 0.45, 0.5, 0.6)  # first look, two epochs, after warming up, projected, distilled
    result = project(config, told)
    assert [stage.score for stage in result.history] == [0.45, 0.6] and result.history[1].projected == 0.5


def test_warming_up_ends_after_its_epochs() -> None:
    config = replace(FACTOR, baseline=0.8, stages=1, warm_up_epochs=2)
    assert project(config, scores(0.1, 0.2, 0.3, 0.31, 0.5, 0.6)).history[0].score == 0.31


@pytest.mark.parametrize("changes", [{"baseline": 0.0}, {"baseline": 0.5, "warm_up": 1.0}])
def test_a_model_that_is_good_enough_is_not_warmed_up(changes: dict[str, float], tmp_path: Path) -> None:
    project(replace(FACTOR, stages=1, **changes), scores(0.5, 0.5, 0.5), folder=tmp_path)
    assert same(files.load(tmp_path / "stage-0", model=Net()), Net())


def test_warming_up_trains(tmp_path: Path) -> None:
    result = project(replace(FACTOR, baseline=1.0, stages=1), folder=tmp_path)
    assert result.history[0].score > accuracy(Net()) + 0.1


def test_the_teacher_may_be_the_moving_average(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path: list[dict[str, Tensor]] = []
    teachers = []
    fit = stages.fit

    def watched(student: nn.Module, teacher: nn.Module | None, *arguments: Any, **more: Any) -> Any:
        teachers.append(teacher)
        after_step = more.pop("after_step")

        def both(model: nn.Module) -> None:
            after_step(model)
            path.append(bits(model))

        return fit(student, teacher, *arguments, after_step=both, **more)

    monkeypatch.setattr(stages, "fit", watched)
    config = replace(FACTOR, teacher="average", baseline=1.0, warm_up_epochs=2, stages=1)
    project(config, folder=tmp_path)
    average = path[0]
    for step in path[1:8]:
        average = {name: 0.99 * average[name] + 0.01 * step[name] for name in average}
    assert teachers[0] is None and teachers[1] is not None
    for name, tensor in teachers[1].state_dict().items():
        torch.testing.assert_close(tensor, average[name], rtol=1e-5, atol=1e-6)
    assert same(files.load(tmp_path / "stage-0" / "average", model=Net()), teachers[1])


def test_a_model_that_was_not_trained_is_its_own_average(monkeypatch: pytest.MonkeyPatch) -> None:
    teachers = []
    fit = stages.fit
    monkeypatch.setattr(stages, "fit", lambda s, t, *a, **k: (teachers.append(t), fit(s, t, *a, **k))[1])
    project(replace(FACTOR, teacher="average", stages=1))
    assert same(teachers[0], Net())


# --- what stops it


def test_a_stage_that_costs_too_much_is_undone() -> None:
    config = replace(FACTOR, stages=3, max_drop=0.1)
    result = project(config, scores(0.8, 0.5, 0.75, 0.5, 0.69))
    assert [stage.undone for stage in result.history] == [False, False, True]
    assert result.reason.startswith("stage 2 is undone: the score fell from 0.8 to 0.69")
    assert size(result.model) == result.history[1].parameters > result.history[2].parameters
    assert projected(result.model) == list(result.history[1].ranks)
    assert "undone" in result.table()


def test_a_drop_of_just_the_limit_is_allowed() -> None:
    result = project(replace(FACTOR, max_drop=0.25), scores(0.75, 0.1, 0.5, 0.1, 0.5))
    assert not any(stage.undone for stage in result.history) and len(result.history) == 3


def test_a_target_that_is_met_ends_the_run() -> None:
    result = project(replace(FACTOR, stages=5, target_parameters=0.9))
    assert result.history[-1].kept <= 0.9 < result.history[-2].kept and len(result.history) < 6
    assert result.reason.startswith("the target is met")


def test_a_rank_below_the_least_share_ends_the_run() -> None:
    result = project(replace(FACTOR, stages=4, min_ratio=0.35, quantile=0.9))
    assert len(result.history) == 2
    assert result.reason.startswith("stage 1 reached min_ratio = 0.35: first")
    narrowed = narrow(replace(WIDTH, min_ratio=0.7))
    assert len(narrowed.history) == 2 and "hidden_size" in narrowed.reason
    # the stream has at most 31 dimensions behind LayerNorm; 0.7 of that is rounded up to whole heads of 8
    assert narrowed.model.config.hidden_size == 24 and narrowed.model.config.intermediate_size == 48


def test_width_mode_ends_when_no_rank_shrinks() -> None:
    result = narrow(replace(WIDTH, multiple=64, stages=3))
    assert result.reason == "no rank shrinks any more" and same(result.model, bert())
    assert [stage.ranks for stage in result.history] == [{}, {}] and "no rank shrinks" in result.table()


def test_factor_mode_goes_on_where_a_slice_does_not_shrink() -> None:
    config = replace(FACTOR, modules=("first", "head"), stages=2, multiple=4)  # of the head's 3 outputs, 3 stay
    result = project(config)
    assert [list(stage.ranks) for stage in result.history] == [[], ["first"], []]
    assert result.reason == "all 2 stages are done"
    assert result.history[2].score == result.history[2].projected == result.history[1].score


# --- checkpoints


def test_nothing_is_written_or_printed_unless_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    project()
    assert [path.name for path in tmp_path.rglob("*")] == ["here"]
    narrow(folder=tmp_path / "run")
    assert capfd.readouterr() == ("", "")


def test_every_stage_is_told_and_kept(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    batches = sentences()
    result = run(bert(), [{"input_ids": batches[0]["input_ids"]}], batches, sentence_accuracy, WIDTH, folder=tmp_path)
    told = capfd.readouterr().err
    assert all(str(stage) in told for stage in result.history) and "stage 2: 100%" in told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.json", "stage-0", "stage-1", "stage-2"]
    stock = BertForSequenceClassification.from_pretrained(tmp_path / "stage-2")
    assert same(stock, result.model) and same(files.load(tmp_path / "stage-2"), result.model)
    assert size(files.load(tmp_path / "stage-1")) == result.history[1].parameters


def test_a_folder_makes_no_difference(tmp_path: Path) -> None:
    with_folder, without = narrow(folder=tmp_path), narrow()
    assert same(with_folder.model, without.model) and with_folder.history == without.history


def test_a_run_that_is_over_is_read(tmp_path: Path) -> None:
    first = project(folder=tmp_path)
    again = project(evaluate=scores(), folder=tmp_path)
    assert same(first.model, again.model) and first.history == again.history and first.reason == again.reason
    assert first.history[1].seconds == again.history[1].seconds > 0


@pytest.mark.parametrize("teacher", ["previous", "average"])
@pytest.mark.parametrize("fails_at", [1, 3, 4, 5, 7])
def test_an_evaluation_that_fails_leaves_whole_checkpoints(fails_at: int, teacher: str, tmp_path: Path) -> None:
    config = replace(FACTOR, baseline=1.0, warm_up_epochs=1, teacher=teacher)
    calls = []

    def evaluate(model: nn.Module) -> float:
        calls.append(1)
        if len(calls) == fails_at:
            raise KeyError("mine")
        return accuracy(model)

    with pytest.raises(KeyError, match="mine"):
        project(config, evaluate, folder=tmp_path)
    whole = 0 if fails_at <= 3 else 1 if fails_at <= 5 else 2
    assert len(list(tmp_path.glob("stage-*"))) == whole
    resumed, wanted = project(config, folder=tmp_path), project(config)
    assert same(resumed.model, wanted.model) and resumed.history == wanted.history


def test_what_was_frozen_stays_frozen(tmp_path: Path) -> None:
    model = bert()
    model.classifier.requires_grad_(False)
    batches = sentences()
    calibration = [{"input_ids": batch["input_ids"]} for batch in batches]
    config = replace(FACTOR, modules=("*attention*",), stages=1)
    result = run(model, calibration, batches, sentence_accuracy, config, folder=tmp_path, progress=False)
    frozen = [name for name, parameter in result.model.named_parameters() if not parameter.requires_grad]
    fixed = [name for name in frozen if "attention" in name]
    assert {"classifier.weight", "classifier.bias"} == {*frozen} - {*fixed}
    assert len(fixed) == len(projected(result.model)) > 0
    assert torch.equal(result.model.classifier.weight, model.classifier.weight)


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    project(replace(FACTOR, stages=1), folder=tmp_path)
    content = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ResumeError, match=r"other settings \(epochs was 1, is 2, stages was 1, is 2\)"):
        project(replace(FACTOR, epochs=2), folder=tmp_path)
    other = Net()
    other.head.bias.data[0] += 1e-7
    with pytest.raises(ResumeError, match="another model"):
        run(other, CALIBRATION, BATCHES, accuracy, replace(FACTOR, stages=1), folder=tmp_path, progress=False)
    assert content == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: {**found, "format": "recipe"}, "no run of rmtkd|not describe a run"),
        (lambda found: {**found, "version": 2}, "version 2"),
        (lambda found: {**found, "config": []}, "no settings"),
        (lambda found: [], "no JSON object"),
        (lambda found: None, "no JSON object"),
    ],
)
def test_a_description_of_a_run_that_is_none_is_refused(change: Any, message: str, tmp_path: Path) -> None:
    checkpoints.Checkpoints(tmp_path, Net(), FACTOR)
    path = tmp_path / "run.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(FileFormatError, match=message):
        project(folder=tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("stage.json", "{"),
        ("stage.json", "{}"),
        ("stage.json", '{"history": [{"number": 0}], "reason": "", "frozen": []}'),
        ("stage.json", '{"history": [], "reason": "", "frozen": []}'),
        ("stage.json", '{"history": 3, "reason": "", "frozen": []}'),
        ("stage.json", "[" * 100_000),
        ("stage.json", None),
        ("weights.safetensors", "not these"),
        ("model.safetensors", None),
    ],
)
def test_a_damaged_stage_is_refused_and_can_be_deleted(name: str, content: str | None, tmp_path: Path) -> None:
    config = replace(FACTOR, stages=1)
    wanted = project(config, folder=tmp_path)
    path = next(tmp_path.glob(f"stage-1/{name}"), tmp_path / "stage-1" / "weights.safetensors")
    if content is None:
        path.unlink()
    else:
        path.write_text(content)
    with pytest.raises(FileFormatError, match="stage-1"):
        project(config, folder=tmp_path)
    for left in (tmp_path / "stage-1").iterdir():
        left.unlink()
    (tmp_path / "stage-1").rmdir()
    again = project(config, folder=tmp_path)
    assert same(again.model, wanted.model) and again.history == wanted.history


def test_digests_tell_models_apart() -> None:
    class Other(Net):
        pass

    assert checkpoints.digest(Net()) == checkpoints.digest(copy.deepcopy(Net()))
    half = Net().bfloat16()
    changed = Net()
    changed.first.weight.data = changed.first.weight.data.reshape(8, 32)
    found = {checkpoints.digest(model) for model in (Net(), Other(), half, Net().double(), changed, bert())}
    assert len(found) == 6
    scalar = nn.BatchNorm1d(3)  # has a state of no dimensions
    before = checkpoints.digest(scalar)
    scalar.num_batches_tracked += 1  # type: ignore[operator]
    assert checkpoints.digest(scalar) != before


# --- what is refused before anything is done


def test_input_that_cannot_work_is_refused_at_once(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(CalibrationError, match="several times"):
        run(Net(), iter(CALIBRATION), BATCHES, accuracy, FACTOR, folder=folder)
    with pytest.raises(CalibrationError, match="no calibration batches"):
        run(Net(), [], BATCHES, accuracy, FACTOR, folder=folder)
    with pytest.raises(ModelError, match=r"unused.*runs"):
        project(replace(FACTOR, modules=("unused",)), folder=folder)
    with pytest.raises(ModelError, match="narrowed"):
        project(WIDTH, folder=folder)
    assert not folder.exists()
