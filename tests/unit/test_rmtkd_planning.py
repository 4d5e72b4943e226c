"""Plans: what they say, that they can be trusted, and that nothing changes before they are carried out."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from rmtkd import factor, latency, planning, width
from rmtkd.compression import compress
from rmtkd.config import Config
from rmtkd.errors import CalibrationError, FileFormatError, PlanError
from rmtkd.latency import milliseconds
from rmtkd.modules import ProjectedLinear
from rmtkd.planning import parameters, plan
from rmtkd.plans import LayerPlan, Plan
from rmtkd.plot import law_counts
from rmtkd.rank import choose
from rmtkd.table import aligned, change, count
from rmtkernels.laws import marchenko_pastur_edges

FACTOR: dict[str, Any] = {"mode": "factor", "multiple": 1, "min_ratio": 0.0, "noise": "median"}


class Net(nn.Module):
    """The outputs of `signal` have three directions that stand out of noise; those of `flat` none that does not."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.signal = nn.Linear(40, 40)
        self.flat = nn.Linear(40, 40)
        basis = torch.linalg.qr(torch.randn(40, 40, generator=generator))[0]
        self.signal.weight.data = basis @ torch.diag(torch.tensor([30.0, 20.0, 10.0] + [1.0] * 37))
        self.flat.weight.data = torch.linalg.qr(torch.randn(40, 40, generator=generator))[0]
        self.signal.bias.data.zero_()
        self.flat.bias.data.zero_()
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.dropout(self.signal(x)) + self.flat(input=x)
        return found


def noise(count: int = 4, rows: int = 1000) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(rows, 40, generator=generator) for _ in range(count)]


def bert() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return BertModel(BertConfig(vocab_size=50, max_position_embeddings=32, **sizes))


def tokens(count: int = 6) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    mask = torch.ones(8, 12, dtype=torch.int64)
    mask[3:, 7:] = 0
    return [
        {"input_ids": torch.randint(50, (8, 12), generator=generator), "attention_mask": mask} for _ in range(count)
    ]


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any], Config]] = {
    "factor": (Net, noise, Config(**FACTOR)),
    "width": (bert, tokens, Config(multiple=4)),
}


@pytest.mark.parametrize("mode", CASES)
def test_a_plan_changes_nothing(mode: str) -> None:
    make, batches, config = CASES[mode]
    model = make().train()
    bits = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hooks = [(dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in model.modules()]
    loader = torch.utils.data.DataLoader(batches(), batch_size=None, shuffle=True)
    torch.manual_seed(4)
    random = torch.get_rng_state()
    compress(model, plan(model, loader, config, progress=False))
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(tensor, bits[name]) for name, tensor in model.state_dict().items())
    assert hooks == [(dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in model.modules()]
    assert all(module.training for module in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("mode", CASES)
def test_twice_gives_the_same_plan(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "milliseconds", lambda functions: dict.fromkeys(functions, 1.0))
    make, batches, config = CASES[mode]
    plans = [plan(make(), batches(), config, progress=False) for _ in range(2)]
    groups = width.groups(make()) if mode == "width" else factor.groups(make(), config)
    named = {group.name for group in groups}
    assert plans[0] == plans[1]
    assert plans[0].covariances.keys() == plans[1].covariances.keys() == named
    for name, moment in plans[0].covariances.items():
        assert torch.equal(moment, plans[1].covariances[name])


@pytest.mark.parametrize("mode", CASES)
def test_json_gives_the_plan_back_without_its_covariances(mode: str) -> None:
    make, batches, config = CASES[mode]
    planned = plan(make(), batches(), config, progress=False)
    back = Plan.from_json(planned.to_json())
    assert back == planned and back.covariances == {}
    assert back.model_milliseconds == planned.model_milliseconds
    assert back.table() == planned.table()
    with pytest.raises(PlanError, match=r"no covariance of .*read from JSON.*plan again"):
        compress(make(), back)


@pytest.mark.parametrize("mode", CASES)
def test_the_plan_of_another_model_is_refused(mode: str) -> None:
    make, batches, config = CASES[mode]
    planned = plan(make(), batches(), config, progress=False)
    other = nn.Sequential(make(), nn.Linear(3, 3))
    with pytest.raises(PlanError, match=r"parameters, this one has"):
        compress(other, planned)


@pytest.mark.parametrize("mode", CASES)
def test_what_is_planned_is_what_happens(mode: str) -> None:
    make, batches, config = CASES[mode]
    model = make()
    planned = plan(model, batches(), config, progress=False)
    smaller = compress(model, planned)
    assert planned.model_parameters == (parameters(model), parameters(smaller))
    assert planned.model_parameters[1] < planned.model_parameters[0]
    assert type(smaller) is type(model)


# Factor mode


def test_ranks_are_what_stands_out() -> None:
    planned = plan(Net(), noise(), Config(**FACTOR), progress=False)
    signal = planned.layer("signal")
    assert signal.rank == signal.choice.raw_rank == 3
    assert signal.choice.rows == 4000 and signal.dim == 40
    x = torch.cat(noise()).double() @ Net().signal.weight.double().T
    spectrum = np.linalg.eigvalsh((x.T @ x / 4000).detach().numpy())[::-1]
    np.testing.assert_allclose(signal.eigenvalues, spectrum, rtol=1e-6)
    assert signal.kept_energy == pytest.approx(spectrum[:3].sum() / spectrum.sum())
    assert signal.choice.edges["median"] == signal.choice.sigma2["median"] * marchenko_pastur_edges(40 / 4000)[1]
    torch.testing.assert_close(planned.covariances["signal"], x.T @ x / 4000, rtol=1e-6, atol=1e-6)
    assert signal.parameters == 40 * 40 + 40 and signal.parameters_projected == 3 * 80 + 40


def test_a_layer_that_would_grow_stays_dense() -> None:
    config = Config(**{**FACTOR, "min_ratio": 0.6})
    planned = plan(Net(), noise(), config, progress=False)
    assert [layer.keep_dense for layer in planned.layers] == ["would not be smaller at rank 24"] * 2
    assert [layer.milliseconds for layer in planned.layers] == [None, None]
    assert planned.model_parameters[0] == planned.model_parameters[1]
    assert "signal stays dense: would not be smaller at rank 24" in planned.table()
    assert "held by min_ratio 0.6: signal, flat" in planned.table()


@pytest.mark.parametrize("insist", [False, True])
@pytest.mark.parametrize("slowness", [1.04, 1.06])
def test_a_layer_that_gets_slower_stays_dense(monkeypatch: pytest.MonkeyPatch, insist: bool, slowness: float) -> None:
    monkeypatch.setattr(planning, "milliseconds", lambda _: {"dense": 1.0, "projected": slowness})
    model = Net()
    planned = plan(model, noise(), Config(**FACTOR, keep_slower=insist), progress=False)
    kept = slowness > 1.05 and not insist
    assert [bool(layer.keep_dense) for layer in planned.layers] == [kept, kept]
    assert isinstance(compress(model, planned).get_submodule("signal"), ProjectedLinear) is not kept
    assert ("measured to be slower" in planned.table()) is kept


def test_layers_are_timed_at_the_shape_of_the_first_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []

    def record(functions: dict[str, Callable[[], Tensor]]) -> dict[str, float]:
        shapes.append({name: function().shape for name, function in functions.items()})
        return {"dense": 2.0, "projected": 1.0}

    monkeypatch.setattr(planning, "milliseconds", record)
    planned = plan(Net(), [torch.randn(7, 3, 40), torch.randn(1000, 40)], Config(**FACTOR), progress=False)
    assert shapes == [{"dense": (7, 3, 40), "projected": (7, 3, 40)}] * 2
    assert (planned.layers[0].milliseconds, planned.layers[0].milliseconds_projected) == (2.0, 1.0)


def test_embeddings_are_timed_on_their_tokens() -> None:
    model = nn.Sequential(nn.Embedding(500, 40), nn.Linear(40, 4))
    model[0].weight.data[:, 3:] *= 0.01
    batches = [torch.randint(500, (8, 20)) for _ in range(3)]
    layer = plan(model, batches, Config(**FACTOR, modules=("0",)), progress=False).layers[0]
    assert layer.rank < 10 and layer.milliseconds is not None


def test_layers_that_cannot_be_projected_are_named() -> None:
    model = nn.Sequential(nn.Embedding(50, 40), nn.Linear(40, 50, bias=False), nn.Linear(50, 40))
    model[1].weight = model[0].weight
    planned = plan(model, [torch.randint(50, (8, 20))], Config(**FACTOR), progress=False)
    assert list(planned.skipped) == ["0", "1"]
    assert "1 is left out: it shares its parameters with 0" in planned.table()


# Width mode


def test_groups_of_one_width_get_the_mean_of_their_ranks() -> None:
    model = bert()
    model.encoder.layer[1].intermediate.dense.weight.data[8:] = 0  # and so are its biases: eight neurons are left
    planned = plan(model, tokens(), Config(multiple=4, calibration_rows=400), progress=False)
    inner = [layer for layer in planned.layers if layer.width == "intermediate_size"]
    assert [layer.choice.support for layer in inner] == [64, 8]
    mean = sum(layer.choice.raw_rank for layer in inner) / 2
    assert 4 * -(-max(layer.choice.raw_rank for layer in inner) // 4) > planned.widths["intermediate_size"]
    assert planned.widths["intermediate_size"] == 4 * -(-mean // 4)
    assert {layer.rank for layer in inner} == {planned.widths["intermediate_size"]}
    raw = ", ".join(str(layer.choice.raw_rank) for layer in inner)
    assert planned.reasons["intermediate_size"] == f"mean {mean:.1f} of {raw}, rounded up"
    assert f"intermediate_size: 64 → {inner[0].rank} (mean {mean:.1f} of {raw}, rounded up)" in planned.table()
    assert planned.model_milliseconds is not None and min(planned.model_milliseconds) > 0
    config: Any = compress(model, planned).config
    assert {name: getattr(config, name) for name in planned.widths} == planned.widths


def test_min_ratio_holds_a_width() -> None:
    planned = plan(bert(), tokens(), Config(multiple=4, min_ratio=0.7), progress=False)
    assert planned.layer("residual").choice.support == 31  # what a new LayerNorm puts out sums to 0
    assert planned.widths == {"hidden_size": 24, "intermediate_size": 48}  # .7 of 31 in heads of 8, and of 64 in fours
    assert planned.reasons["hidden_size"].endswith("rounded up to a multiple of 8, held by min_ratio 0.7")
    assert planned.reasons["intermediate_size"].endswith("rounded up, held by min_ratio 0.7")


def test_too_few_rows_are_told() -> None:
    table = plan(bert(), tokens(1), Config(multiple=4, calibration_rows=10), progress=False).table()
    assert "calibrate on more data" not in table  # 71 rows of 64
    short = [{name: tensor[:, :2] for name, tensor in batch.items()} for batch in tokens(1)]
    table = plan(bert(), short, Config(multiple=4, calibration_rows=10), progress=False).table()
    assert "and others have fewer rows than dimensions: calibrate on more data" in table


# Refusals


def test_batches_that_can_be_read_once_only() -> None:
    with pytest.raises(CalibrationError, match="a list or a loader, not an iterator"):
        plan(Net(), iter(noise()), Config(**FACTOR))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda found: found.pop("format"), "is no plan"),
        (lambda found: found.update(format_version=2), "version 2, this rmtkd reads 1"),
        (lambda found: found.pop("widths"), "plan must have the fields config, layers, widths"),
        (lambda found: found.update(more=1), "plan must have the fields"),
        (lambda found: found["layers"][0].update(rank="3"), r"plan.layers\[0\].rank must be int, got '3'"),
        (lambda found: found["layers"][0]["choice"].update(q=None), r"layers\[0\].choice.q must be float, got None"),
        (lambda found: found["layers"][0]["choice"]["edges"].update(fit="x"), r"choice.edges.fit must be float"),
        (lambda found: found["layers"][0].update(eigenvalues=[1, True]), r"eigenvalues\[1\] must be float"),
        (lambda found: found.update(model_parameters=[1]), "model_parameters must be tuple"),
        (lambda found: found.update(model_milliseconds=[1, "2"]), "model_milliseconds must be float, got '2'"),
    ],
)
def test_what_is_no_plan(change: Callable[[Any], Any], reason: str) -> None:
    found = json.loads(small_plan().to_json())
    change(found)
    with pytest.raises(FileFormatError, match=reason):
        Plan.from_json(json.dumps(found))


@pytest.mark.parametrize("text", ["{", "[]", "3", "[" * 10**5])
def test_what_is_not_even_an_object(text: str) -> None:
    with pytest.raises(FileFormatError):
        Plan.from_json(text)


def test_a_layer_that_is_not_planned() -> None:
    with pytest.raises(KeyError):
        small_plan().layer("third")


def small_plan(spectrum: tuple[float, ...] = (9.0, 2.0, 1.0, 0.5), **settings: Any) -> Plan:
    config = Config(**{"multiple": 1, "min_ratio": 0.0, "mode": "factor", **settings})
    choice = choose(spectrum, 100, config)
    layer = LayerPlan("a.very.long.name.of.a.layer.deep.within.the.model.dense", "", choice, 1, 0.5, spectrum)
    return Plan(config, (layer,), {}, {}, {}, (10, 5))


# Table, picture, times


def test_the_table_is_one_a_person_can_read() -> None:
    lines = small_plan().table().splitlines()
    assert lines[0] == "factor mode, ranks by quantile 0.45, rounded up to multiples of 1"
    head = ["layer", "d", "n", "σ²", "edge", "quantile", "median", "trace", "fit", "spikes", "rank", "energy"]
    assert lines[2].split() == [*head, "parameters", "ms"]
    assert lines[3].startswith("…") and lines[3].split()[0].endswith("deep.within.the.model.dense")
    assert lines[-1] == "parameters: 10 → 5 (−50.0 %)"
    assert max(map(len, lines)) < 160


def test_tables() -> None:
    assert aligned([["a", "bb"], ["ccc", "d"]]) == "a    bb\nccc   d"
    assert [count(n) for n in (0, 999, 1000, 22_713_216, 2 * 10**9)] == ["0", "999", "1 k", "22.7 M", "2 G"]
    assert [change(*pair) for pair in ((100, 41.2), (100, 110), (100, 100), (0, 5))] == [
        "−58.8 %",
        "+10.0 %",
        "0.0 %",
        "0.0 %",
    ]


@pytest.mark.parametrize("spectrum", [(9.0, 2.0, 1.0, 0.5), (0.0,) * 4, (9.0, 2.0, 1e-30, 0.0)])
def test_a_picture(tmp_path: Path, spectrum: tuple[float, ...]) -> None:
    path = small_plan(spectrum, noise="median").plot(tmp_path / "plan.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_picture_of_more_layers_than_a_row_holds(tmp_path: Path) -> None:
    planned = small_plan()
    many = replace(planned, layers=planned.layers * 4)
    assert (tmp_path / "plan.svg") == many.plot(tmp_path / "plan.svg")
    assert (tmp_path / "plan.svg").stat().st_size > small_plan().plot(tmp_path / "one.svg").stat().st_size


def test_the_law_in_the_picture_counts_eigenvalues() -> None:
    bins = np.geomspace(0.01, 100, 50)
    counts = law_counts(bins, 2.0, 300, 0.1)
    assert counts.sum() == pytest.approx(300)
    low, high = (2 * edge for edge in marchenko_pastur_edges(0.1))
    assert (counts[(bins[1:] < low) | (bins[:-1] > high)] == 0).all()


def test_times_are_medians_of_calls_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 0.0
    durations = {"a": iter([9.0, 0.001, 0.002, 0.003, 5.0, 0.002]), "b": iter([9.0] + [0.1] * 5)}
    calls = []

    def call(name: str) -> Callable[[], None]:
        def function() -> None:
            nonlocal clock
            calls.append(name)
            clock += next(durations[name])

        return function

    monkeypatch.setattr(latency.time, "perf_counter", lambda: clock)
    found = milliseconds({"a": call("a"), "b": call("b")})
    assert found == pytest.approx({"a": 2.0, "b": 100.0})
    assert "".join(calls) == "ab" + "abbaabbaab"
