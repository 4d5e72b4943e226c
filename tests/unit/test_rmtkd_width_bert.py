"""BERT narrowed: nothing is lost at the full width, nor where the wide model is a narrow one in disguise."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import layer_norm
from transformers import AutoModel, BertConfig, BertModel

from rmtkd import width
from rmtkd.calibration import calibrate
from rmtkd.config import Config
from rmtkd.errors import CalibrationError, ModelError, PlanError
from rmtkd.residual import layer_norm_basis

VOCABULARY, HEADS, LAYERS = 50, 4, 2
HEADED = ("BertForSequenceClassification", "BertForTokenClassification", "BertForQuestionAnswering")


def bert(hidden: int, inner: int, kind: str = "BertModel", seed: int = 0, **changes: Any) -> Any:
    """Random weights, larger than usual, so that attention and neurons matter; norms that are not the identity."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {"num_hidden_layers": LAYERS, "num_attention_heads": HEADS, **changes}
    config = BertConfig(vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=inner, **settings)
    config.max_position_embeddings, config.num_labels = 40, 2
    model = getattr(transformers, kind)(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.2 if name.endswith("bias") else (1.5 / parameter.shape[-1]) ** 0.5
            parameter.add_(scale * torch.randn(parameter.shape))
    return model


def batches(count: int = 6, seed: int = 1) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for index in range(count):
        mask = torch.ones(8, 12 + index, dtype=torch.long)
        mask[::2, 7:] = 0
        ids = torch.randint(0, VOCABULARY, mask.shape, generator=generator)
        found.append({"input_ids": ids, "attention_mask": mask})
    return found


def moments(model: nn.Module) -> dict[str, Tensor]:
    states = calibrate(model, batches(), width.groups(model), rows=10_000, progress=False)
    return {name: state.covariance(center=False) for name, state in states.items()}


def outputs(model: nn.Module, seed: int = 2) -> Tensor:
    """What the model gives for tokens that count."""
    (batch,) = batches(1, seed)
    with torch.no_grad():
        output = model(**batch)[0]
    return output[batch["attention_mask"] != 0] if output.dim() == 3 else output


class Disguise:
    """A narrow BERT as a wide one: the stream turned into more dimensions, neurons doubled, heads among others."""

    def __init__(self, narrow: Any, hidden: int) -> None:
        self.narrow, k = narrow, narrow.config.hidden_size
        self.k, self.d = k, hidden
        self.turn = self._with_mean(k, hidden)
        inner = 2 * narrow.config.intermediate_size
        self.wide = bert(hidden, inner, type(narrow).__name__, num_attention_heads=HEADS * hidden // k)
        with torch.no_grad():
            self._write(self.wide.base_model, narrow.base_model)
            if hasattr(narrow, "classifier"):
                self.wide.classifier.weight.copy_(narrow.classifier.weight @ self.turn.T)
                self.wide.classifier.bias.copy_(narrow.classifier.bias)

    @staticmethod
    def _with_mean(k: int, d: int) -> Tensor:
        """(d, k) orthonormal columns that take the mean direction to the mean direction."""
        generator = torch.Generator().manual_seed(5)

        def frame(size: int) -> Tensor:
            start = torch.randn(size, size, generator=generator, dtype=torch.float64)
            start[:, 0] = 1
            basis = torch.linalg.qr(start)[0]
            return basis * basis[0, 0].sign()

        return (frame(d)[:, :k] @ frame(k).T).float()

    def _write(self, wide: Any, narrow: Any) -> None:
        turn = self.turn
        for name in ("word_embeddings", "position_embeddings", "token_type_embeddings"):
            getattr(wide.embeddings, name).weight.copy_(getattr(narrow.embeddings, name).weight @ turn.T)
        self._norm(wide.embeddings.LayerNorm, narrow.embeddings.LayerNorm)
        for new, old in zip(wide.encoder.layer, narrow.encoder.layer, strict=True):
            self._heads(new.attention, old.attention)
            self._norm(new.attention.output.LayerNorm, old.attention.output.LayerNorm)
            new.intermediate.dense.weight.copy_(old.intermediate.dense.weight.repeat(2, 1) @ turn.T)
            new.intermediate.dense.bias.copy_(old.intermediate.dense.bias.repeat(2))
            second = old.output.dense
            new.output.dense.weight.copy_(turn @ torch.cat((0.3 * second.weight, 0.7 * second.weight), 1))
            new.output.dense.bias.copy_(turn @ second.bias)
            self._norm(new.output.LayerNorm, old.output.LayerNorm)

    def _norm(self, wide: Any, narrow: Any) -> None:
        """The narrow gains are one number: others have no wide norm that does the same."""
        wide.weight.fill_(float(narrow.weight[0]) * (self.k / self.d) ** 0.5)
        wide.bias.copy_(self.turn @ narrow.bias)

    def _heads(self, wide: Any, narrow: Any) -> None:
        """Among as many others, in any order: two twins, whose shares nearly cancel, and two that nobody reads."""
        h = self.k // HEADS
        order = torch.randperm(2 * HEADS)  # of the narrow heads, the twins of the first two, and the unread
        place = torch.argsort(order).repeat_interleave(h) * h + torch.arange(h).repeat(2 * HEADS)
        for name in ("query", "key", "value"):
            layer, source = getattr(wide.self, name), getattr(narrow.self, name)
            others = torch.randn(2 * h, self.k)
            weight = torch.cat((source.weight, source.weight[: 2 * h], others))
            layer.weight[place] = weight @ self.turn.T
            layer.bias[place] = torch.cat((source.bias, source.bias[: 2 * h], torch.randn(2 * h)))
        source = narrow.output.dense
        first, rest = source.weight[:, : 2 * h], source.weight[:, 2 * h :]
        columns = torch.cat((3 * first, rest, -2 * first, torch.zeros(self.k, 2 * h)), 1)
        wide.output.dense.weight[:, place] = self.turn @ columns
        wide.output.dense.bias.copy_(self.turn @ source.bias)


def disguise(kind: str = "BertModel") -> Disguise:
    narrow = bert(12, 20, kind, seed=3)
    with torch.no_grad():
        for name, parameter in narrow.named_parameters():
            if name.endswith("LayerNorm.weight"):
                parameter.fill_(1.3)
    return Disguise(narrow, 24)


@pytest.mark.parametrize("kind", ["BertModel", *HEADED])
@pytest.mark.parametrize("fitted", [False, True])
def test_the_full_width_gives_the_same(kind: str, fitted: bool) -> None:
    model = bert(24, 40, kind)
    full = {"hidden_size": 24, "intermediate_size": 40}
    same = width.narrow(model, full, moments(model), Config(), batches() if fitted else None)
    torch.testing.assert_close(outputs(same), outputs(model), rtol=0, atol=2e-5)


def test_the_disguise_is_the_narrow_model() -> None:
    found = disguise()
    torch.testing.assert_close(outputs(found.wide), outputs(found.narrow) @ found.turn.T, rtol=0, atol=1e-4)


@pytest.mark.parametrize("fitted", [False, True])
@pytest.mark.parametrize("kind", ["BertModel", "BertForTokenClassification"])
def test_a_narrow_model_in_disguise_loses_nothing(kind: str, fitted: bool) -> None:
    """Stream, heads and neurons at once: all of the narrow model is found again."""
    found = disguise(kind)
    calibration = batches() if fitted else None
    widths = {"hidden_size": 12, "intermediate_size": 20}
    narrow = width.narrow(found.wide, widths, moments(found.wide), Config(), calibration)
    assert narrow.config.num_attention_heads == HEADS
    expected, got = outputs(found.wide), outputs(narrow)
    if kind == "BertModel":  # in axes of its own: the same up to a rotation
        expected, got = expected @ expected.T, got @ got.T
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


def test_one_width_alone() -> None:
    found = disguise()
    inner = width.narrow(found.wide, {"intermediate_size": 20}, moments(found.wide), Config())
    assert (inner.config.hidden_size, inner.config.intermediate_size) == (24, 20)
    torch.testing.assert_close(outputs(inner), outputs(found.wide), rtol=0, atol=1e-4)
    stream = width.narrow(found.wide, {"hidden_size": 12}, moments(found.wide), Config())
    assert (stream.config.hidden_size, stream.config.intermediate_size) == (12, 40)
    expected, got = outputs(found.wide), outputs(stream)
    torch.testing.assert_close(got @ got.T, expected @ expected.T, rtol=1e-3, atol=1e-3)


def test_a_classifier_reads_the_pooler_through_the_neurons_that_stay() -> None:
    """A pooler whose neurons come in pairs needs half of them."""
    model = bert(24, 40, "BertForSequenceClassification", num_attention_heads=2 * HEADS)
    with torch.no_grad():
        pooler = model.bert.pooler.dense
        pooler.weight[12:], pooler.bias[12:] = pooler.weight[:12], pooler.bias[:12]
    found = disguise("BertModel")
    with torch.no_grad():
        model.bert.load_state_dict({**model.bert.state_dict(), **without_pooler(found.wide)})
    widths = {"hidden_size": 12, "intermediate_size": 20}
    narrow = width.narrow(model, widths, moments(model), Config())
    torch.testing.assert_close(outputs(narrow), outputs(model), rtol=0, atol=1e-3)


def without_pooler(model: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in model.state_dict().items() if not name.startswith("pooler.")}


def test_fitted_norms_come_nearer() -> None:
    model = bert(24, 40, "BertForTokenClassification")
    widths, found = {"hidden_size": 12, "intermediate_size": 28}, moments(model)
    errors = {}
    for name, calibration in (("closed", None), ("fitted", batches())):
        narrow = width.narrow(model, widths, found, Config(), calibration)
        errors[name] = float((outputs(narrow) - outputs(model)).norm() / outputs(model).norm())
    assert errors["fitted"] < 0.95 * errors["closed"]


@pytest.mark.parametrize("kind", ["BertModel", *HEADED])
def test_stock_transformers_load_it_bit_for_bit(kind: str, tmp_path: Path) -> None:
    model = bert(24, 40, kind)
    narrow = width.narrow(model, {"hidden_size": 12, "intermediate_size": 16}, moments(model), Config())
    narrow.save_pretrained(tmp_path)
    loaded = getattr(transformers, kind).from_pretrained(tmp_path).eval()
    assert torch.equal(outputs(loaded), outputs(narrow))
    base = AutoModel.from_pretrained(tmp_path).eval()
    assert isinstance(base, BertModel) and base.config.hidden_size == 12


def test_the_model_is_left_as_it_was() -> None:
    model = bert(24, 40, "BertForSequenceClassification").train()
    model.bert.embeddings.eval()
    found = moments(model)
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    model.bert.embeddings.word_embeddings.weight.requires_grad_(False)
    random_state = torch.get_rng_state()
    narrow = width.narrow(model, {"hidden_size": 12, "intermediate_size": 16}, found, Config(), batches())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks for net in (model, narrow) for module in net.modules())
    assert narrow.training
    assert not narrow.bert.embeddings.word_embeddings.weight.requires_grad
    assert narrow.classifier.weight.requires_grad
    assert model.config.hidden_size == 24 and narrow.config.hidden_size == 12


def test_dtype_and_repetition() -> None:
    model = bert(24, 40)
    found = moments(model)
    widths = {"hidden_size": 12, "intermediate_size": 16}
    first, second = (width.narrow(model, widths, found, Config(), batches()) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    half = width.narrow(copy.deepcopy(model).bfloat16(), widths, found, Config())
    assert half.dtype == torch.bfloat16


def test_heads_are_as_wide_after_two_stages() -> None:
    once = width.narrow(bert(24, 40), {"hidden_size": 18}, moments(bert(24, 40)), Config())
    twice = width.narrow(once, {"hidden_size": 12}, moments(once), Config())
    assert [model.config.num_attention_heads for model in (once, twice)] == [3, 2]
    assert width.groups(twice)[0].multiple == 6


def test_groups() -> None:
    model = bert(24, 40, "BertForSequenceClassification")
    residual, *others = width.groups(model)
    inner, context = others[:LAYERS], others[LAYERS:]
    assert (residual.width, residual.multiple, len(residual.taps)) == ("hidden_size", 24 // HEADS, 1 + 2 * LAYERS)
    assert [group.width for group in inner] == ["intermediate_size"] * LAYERS
    assert [(group.name, group.ranked) for group in context] == [("layer.0.context", False), ("layer.1.context", False)]
    names = dict(model.named_modules())
    assert all(tap.module in names for group in (residual, *others) for tap in group.taps)


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ({"hidden_size": 16}, "multiple of 6"),
        ({"hidden_size": 28}, "from 1 to 24"),
        ({"hidden_size": 0}, "from 1 to 24"),
        ({"intermediate_size": 8.5}, "whole number"),
        ({"intermediate": 8}, "no width intermediate"),
        ({"": 8}, "no width"),
    ],
)
def test_widths_that_the_model_cannot_have(widths: dict[str, Any], message: str) -> None:
    model = bert(24, 40)
    with pytest.raises(PlanError, match=message):
        width.narrow(model, widths, moments(model), Config())


def test_covariances_that_do_not_fit() -> None:
    model = bert(24, 40)
    found = moments(model)
    widths = {"hidden_size": 12, "intermediate_size": 16}
    with pytest.raises(PlanError, match=r"layer\.1\.inner needs a \(40, 40\)"):
        width.narrow(model, widths, {k: v for k, v in found.items() if k != "layer.1.inner"}, Config())
    with pytest.raises(PlanError, match=r"layer\.0\.context needs a \(24, 24\)"):
        width.narrow(model, widths, {k: v for k, v in found.items() if not k.endswith("context")}, Config())
    with pytest.raises(PlanError, match="shape"):
        width.narrow(model, widths, {**found, "residual": torch.eye(12)}, Config())
    with pytest.raises(PlanError, match="not finite"):
        width.narrow(model, widths, {**found, "residual": found["residual"] * float("nan")}, Config())


def test_models_that_cannot_be_narrowed() -> None:
    with pytest.raises(ModelError, match="BertForSequenceClassification"):
        width.groups(nn.Linear(3, 3))
    with pytest.raises(ModelError, match="BertForMaskedLM cannot be narrowed"):
        width.groups(bert(24, 40, "BertForMaskedLM"))
    with pytest.raises(ModelError, match="cross-attention"):
        width.groups(bert(24, 40, is_decoder=True, add_cross_attention=True))


def test_batches_that_have_been_read() -> None:
    model = bert(24, 40)
    with pytest.raises(CalibrationError, match="iterator"):
        width.narrow(model, {"hidden_size": 18}, moments(model), Config(), iter([]))
    assert not any(module._forward_hooks for module in model.modules())


def test_first_gains_are_the_regression_of_each_axis() -> None:
    """The embeddings' norm comes first: nothing before it depends on the fit."""
    model = bert(24, 40)
    found, widths = moments(model), {"hidden_size": 12}
    basis = layer_norm_basis(found["residual"], 12).float()
    narrow = width.narrow(model, widths, found, Config(), batches())
    inputs, targets = [], []
    for batch in batches():
        mask = batch["attention_mask"] != 0
        with torch.no_grad():
            tables = narrow.embeddings
            positions = tables.position_embeddings.weight[: mask.shape[1]] + tables.token_type_embeddings.weight[0]
            inputs.append((tables.word_embeddings(batch["input_ids"]) + positions)[mask])
            targets.append(model.embeddings(batch["input_ids"])[mask] @ basis)
    rows, target = layer_norm(torch.cat(inputs), (12,)), torch.cat(targets)
    norm = narrow.embeddings.LayerNorm
    for axis in range(12):
        design = torch.stack((rows[:, axis], torch.ones(len(rows))), 1)
        gain, offset = torch.linalg.lstsq(design, target[:, axis, None]).solution.flatten()
        assert abs(gain - norm.weight[axis]) < 1e-4 and abs(offset - norm.bias[axis]) < 1e-4


def test_a_float64_model_is_fitted_as_well() -> None:
    model = bert(24, 40).double()
    found = moments(model)
    single = width.narrow(copy.deepcopy(model).float(), {"hidden_size": 18}, found, Config(), batches())
    double = width.narrow(model, {"hidden_size": 18}, found, Config(), batches())
    torch.testing.assert_close(outputs(double).float(), outputs(single), rtol=0, atol=1e-3)
