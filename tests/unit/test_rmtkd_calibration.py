"""Moments of activations against NumPy's, and a model that is afterwards what it was."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rmtkd.calibration import calibrate, move_to
from rmtkd.errors import CalibrationError, ModelError
from rmtkd.groups import Group, Tap


class Blocks(nn.Module):
    """Two layers of one width with dropout, a mask that it ignores, and a frozen part in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(50, 6)
        self.first = nn.Linear(6, 6)
        self.dropout = nn.Dropout(0.5)
        self.second = nn.Linear(6, 4)
        self.frozen = nn.Dropout(0.5).eval()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor]:
        hidden = self.dropout(self.first(self.table(input_ids)))
        return (self.frozen(self.second(hidden)),)


def texts(count: int, length: int = 5, seed: int = 0) -> list[dict[str, Tensor]]:
    """Batches of 3 texts; the second text is short by two tokens, the third is all padding but one."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(3, length, dtype=torch.int64)
    mask[1, -2:] = 0
    mask[2, 1:] = 0
    return [
        {"input_ids": torch.randint(50, (3, length), generator=generator), "attention_mask": mask} for _ in range(count)
    ]


def group(*taps: tuple[str, str], **options: Any) -> Group:
    return Group("g", tuple(Tap(*tap) for tap in taps), **options)


def oracle(rows: Tensor) -> Tensor:
    return rows.double().T @ rows.double() / len(rows)


def moment(model: nn.Module, batches: Any, wanted: Group, rows: int = 10**6) -> tuple[Tensor, int]:
    state = calibrate(model, batches, [wanted], rows=rows, progress=False)["g"]
    return state.covariance(center=False), state.rows


def test_masked_rows_do_not_count() -> None:
    model, batches = Blocks(), texts(4)
    found, rows = moment(model, batches, group(("first", "input")))
    kept = torch.cat([model.table(batch["input_ids"])[batch["attention_mask"] == 1] for batch in batches])
    assert rows == len(kept) == 4 * (5 + 3 + 1)
    torch.testing.assert_close(found, oracle(kept), rtol=1e-12, atol=1e-14)


def test_the_moment_is_not_centred() -> None:
    model = nn.Linear(3, 3)
    rows = torch.randn(40, 3) + 10
    found, _ = moment(model, [rows], group(("", "input")))
    torch.testing.assert_close(found, oracle(rows), rtol=1e-12, atol=0)
    assert found.diagonal().min() > 90


def test_taps_of_a_group_are_pooled() -> None:
    model, batches = Blocks().eval(), texts(3)
    found, rows = moment(model, batches, group(("table", "output"), ("first", "output")))
    kept = [model.table(batch["input_ids"])[batch["attention_mask"] == 1] for batch in batches]
    pooled = torch.cat([*kept, *map(model.first, kept)])
    assert rows == len(pooled)
    torch.testing.assert_close(found, oracle(pooled), rtol=1e-6, atol=1e-7)


def test_the_model_runs_in_eval_mode() -> None:
    model, batches = Blocks().train(), texts(3)
    found, _ = moment(model, batches, group(("second", "input")))
    kept = torch.cat([model.first(model.table(b["input_ids"]))[b["attention_mask"] == 1] for b in batches])
    torch.testing.assert_close(found, oracle(kept), rtol=1e-6, atol=1e-7)


def test_images_have_a_row_per_position() -> None:
    convolution = nn.Conv2d(3, 5, 3)
    images = [torch.randn(2, 3, 8, 6) for _ in range(3)]
    found, rows = moment(nn.Sequential(convolution), images, group(("0", "output")))
    positions = torch.cat([convolution(image).permute(0, 2, 3, 1).reshape(-1, 5) for image in images])
    assert rows == len(positions) == 3 * 2 * 6 * 4
    torch.testing.assert_close(found, oracle(positions), rtol=1e-6, atol=1e-7)


def test_four_dimensions_at_a_linear_layer_are_no_image() -> None:
    rows = torch.randn(2, 3, 4, 5)
    found, _ = moment(nn.Sequential(nn.Linear(5, 2)), [rows], group(("0", "input")))
    torch.testing.assert_close(found, oracle(rows.reshape(-1, 5)), rtol=1e-12, atol=1e-14)


def test_a_flat_activation_takes_the_mask_of_its_tokens() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            out: Tensor = self.layer(input=x.reshape(-1, 4))  # by keyword
            return out

    x, mask = torch.randn(3, 5, 4), texts(1)[0]["attention_mask"]
    found, rows = moment(Flat(), [{"x": x, "attention_mask": mask}], group(("layer", "input")))
    assert rows == 9
    torch.testing.assert_close(found, oracle(x[mask == 1]), rtol=1e-12, atol=1e-14)


def test_scaled_rows_have_no_scale() -> None:
    rows = torch.randn(50, 4) * torch.logspace(-3, 3, 50)[:, None]
    rows[7] = 0
    found, _ = moment(nn.Identity(), [rows], group(("", "output"), scaled=True))
    unit = rows.double() / rows.double().square().mean(1, keepdim=True).sqrt().clamp(min=1e-300)
    torch.testing.assert_close(found, oracle(unit), rtol=1e-12, atol=1e-14)
    assert found.trace().item() == pytest.approx(4 * 49 / 50)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    rows = torch.randn(60, 4).to(dtype)
    found, _ = moment(nn.Identity(), [rows], group(("", "output")))
    torch.testing.assert_close(found, oracle(rows), rtol=1e-12, atol=1e-14)


def test_batches_as_mapping_tuple_and_tensor() -> None:
    model, batches = Blocks(), texts(3)
    first, _ = moment(model, batches, group(("first", "input")))
    for batch in batches:
        batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    forms: list[Any] = [
        batches,
        [(batch["input_ids"], batch["attention_mask"]) for batch in batches],
        [batch["input_ids"] for batch in batches],
    ]
    moments = [moment(model, form, group(("first", "input")))[0] for form in forms]
    assert torch.equal(moments[0], moments[1]) and torch.equal(moments[0], moments[2])
    assert not torch.allclose(moments[0], first)


def test_stops_when_every_group_has_its_rows() -> None:
    seen = []

    def batches() -> Any:
        for batch in texts(20):
            seen.append(batch)
            yield batch

    states = calibrate(
        Blocks(),
        batches(),
        [Group("all", (Tap("first", "input"), Tap("first", "output"))), Group("half", (Tap("second", "output"),))],
        rows=30,
        progress=False,
    )
    assert len(seen) == 4  # 9 rows a batch
    assert states["half"].rows == 36
    assert 30 <= states["all"].rows <= 36 + 18


def test_a_group_with_many_rows_takes_them_from_all_batches() -> None:
    """Every batch has a direction of its own: a moment made of the first few would lack the others."""
    model = nn.Sequential(nn.Identity(), nn.Linear(12, 12))
    batches = [torch.eye(12)[i].repeat(8, 1) for i in range(12)]
    many = Group("many", tuple(Tap("0", side) for side in ("input", "output") for _ in range(2)))
    states = calibrate(model, batches, [many, Group("few", (Tap("1", "input"),))], rows=96, progress=False)
    torch.testing.assert_close(states["many"].covariance(center=False), torch.eye(12).double() / 12)
    assert states["many"].rows == states["few"].rows == 96


def test_fewer_rows_than_wanted_are_all_there_is() -> None:
    assert moment(Blocks(), texts(2), group(("first", "input")), rows=1000)[1] == 18


@pytest.mark.parametrize("broken", [False, True])
def test_the_model_is_what_it_was(broken: bool) -> None:
    model = Blocks().train()
    model.frozen.eval()
    bits = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    batches: list[Any] = texts(3)
    if broken:
        batches.append({"nonsense": torch.ones(2)})
    torch.manual_seed(5)
    random = torch.get_rng_state()
    loader = torch.utils.data.DataLoader(batches, batch_size=None, shuffle=True)  # draws from the global state
    try:
        calibrate(model, loader, [group(("first", "input"), ("second", "input"))], rows=10**6, progress=False)
    except CalibrationError:
        assert broken
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, bits[name]) for name, tensor in model.state_dict().items())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.is_grad_enabled()


def test_twice_gives_the_same_bits() -> None:
    groups = [Group("a", (Tap("first", "input"), Tap("first", "output"))), Group("b", (Tap("second", "output"),))]
    runs = [calibrate(Blocks(), texts(9), groups, rows=60, progress=False) for _ in range(2)]
    for name in ("a", "b"):
        assert torch.equal(*(run[name].covariance(center=False) for run in runs))


def test_the_bar_shows_only_if_it_takes_long(capsys: pytest.CaptureFixture[str]) -> None:
    calibrate(Blocks(), texts(2), [group(("first", "input"))], rows=10)
    captured = capsys.readouterr()
    assert captured.out == "" and "calibrating" not in captured.err


@pytest.mark.parametrize(
    ("taps", "batches", "error", "reason"),
    [
        ([("first", "input")], [], CalibrationError, "no calibration batches"),
        ([("third", "input")], texts(1), ModelError, "no module 'third'"),
        ([("first", "output"), ("second", "output")], texts(1), CalibrationError, "differ in width: 4 at second, 6"),
        ([("first", "input")], [{"input": torch.ones(2)}], CalibrationError, "does not take this batch.*input"),
        ([("first", "input")], [torch.full((2, 3), 99)], CalibrationError, "does not take this batch"),
        ([("table", "input")], texts(1), CalibrationError, "input of table is no activation.*int64"),
        ([("", "input")], [{"input_ids": torch.ones(2, 3, dtype=torch.int64)}], CalibrationError, "no activation"),
        ([("unused", "input")], texts(1), CalibrationError, "no activations of g in the first batch: did unused run"),
    ],
)
def test_refusals(taps: Any, batches: Any, error: type[Exception], reason: str) -> None:
    model = Blocks()
    model.unused = nn.Linear(2, 2)
    with pytest.raises(error, match=reason):
        calibrate(model, batches, [group(*taps)], rows=10, progress=False)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


def test_all_masked_out_is_refused() -> None:
    batch = texts(1)[0]
    batch["attention_mask"] = torch.zeros_like(batch["attention_mask"])
    with pytest.raises(CalibrationError, match="mask"):
        moment(Blocks(), [batch], group(("first", "input")))


def test_activations_that_are_not_finite_are_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(CalibrationError, match="activations at 0 are not finite"):
        moment(model, [torch.tensor([[1.0, 2.0], [float("inf"), 0.0]])], group(("0", "input")))


def test_no_groups_are_refused() -> None:
    with pytest.raises(CalibrationError, match="no groups"):
        calibrate(Blocks(), texts(1), [], rows=10)


def test_move_to_goes_into_what_holds_tensors() -> None:
    inner = torch.ones(2)
    moved = move_to({"a": inner, "b": [inner, "text"], "c": (inner, {"d": inner})}, "meta")
    assert moved["a"].is_meta and moved["b"][0].is_meta and moved["b"][1] == "text"
    assert moved["c"][1]["d"].is_meta and isinstance(moved["c"], tuple)
