"""ResNet narrowed: nothing is lost at the full width, nor where channels are copies of each other."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForImageClassification, ResNetConfig

import rmtkd
from rmtkd import width
from rmtkd.calibration import calibrate
from rmtkd.config import Config
from rmtkd.errors import ConfigError, PlanError

KINDS = ("ResNetModel", "ResNetForImageClassification")


def resnet(stem: int, sizes: list[int], kind: str = "ResNetForImageClassification", **changes: Any) -> Any:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"layer_type": "basic", "depths": [2] * len(sizes), "num_labels": 5, **changes}
    model = getattr(transformers, kind)(ResNetConfig(embedding_size=stem, hidden_sizes=sizes, **settings)).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.copy_(0.5 + torch.rand(module.weight.shape))
                module.bias.normal_(std=0.3)
                module.running_mean.normal_(std=0.3)
                module.running_var.copy_(0.5 + torch.rand(module.running_var.shape))
    return model


def batches(count: int = 4, seed: int = 1) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"pixel_values": torch.randn(8, 3, 32, 32, generator=generator)} for _ in range(count)]


def moments(model: nn.Module) -> dict[str, Tensor]:
    states = calibrate(model, batches(), width.groups(model), rows=10_000, progress=False)
    return {name: state.covariance(center=False) for name, state in states.items()}


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**batches(1, seed=2)[0])[0]
    return found


def double(narrow: Any) -> Any:
    """Twice the channels, the second half of each at another size, and readers that take a part of both."""
    config = narrow.config
    sizes = [2 * size for size in config.hidden_sizes]
    joined = isinstance(narrow.base_model.encoder.stages[0].layers[0].shortcut, nn.Identity)
    wide = resnet(2 * config.embedding_size, sizes, type(narrow).__name__, layer_type=config.layer_type)
    sources = dict(narrow.named_modules())
    with torch.no_grad():
        for name, module in wide.named_modules():
            source: Any = sources[name]
            if isinstance(module, nn.Conv2d):
                weight = source.weight.repeat(2, 1, 1, 1)
                weight = weight if name.endswith("embedder.convolution") else parts(weight)
                module.weight.copy_(weight)
            elif isinstance(module, nn.BatchNorm2d):
                for part in ("weight", "bias"):
                    value = getattr(source, part)
                    getattr(module, part).copy_(torch.cat((value, 0.5 * value)))
                module.running_mean.copy_(source.running_mean.repeat(2))
                module.running_var.copy_(source.running_var.repeat(2))
            elif isinstance(module, nn.Linear):
                module.weight.copy_(parts(source.weight))
                module.bias.copy_(source.bias)
    assert joined == isinstance(wide.base_model.encoder.stages[0].layers[0].shortcut, nn.Identity)
    return wide


def parts(weight: Tensor) -> Tensor:
    """Of channels (a, a / 2): 0.6 a + 0.8 (a / 2)."""
    return torch.cat((0.6 * weight, 0.8 * weight), 1)


@pytest.mark.parametrize("fitted", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", ["basic", "bottleneck"])
@pytest.mark.parametrize("stem", [8, 6])
def test_the_full_width_gives_the_same(stem: int, layer: str, kind: str, fitted: bool) -> None:
    model = resnet(stem, [8, 12], kind, layer_type=layer)
    same = width.narrow(model, {}, moments(model), Config(), batches() if fitted else None)
    torch.testing.assert_close(outputs(same), outputs(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fitted", [False, True])
@pytest.mark.parametrize("layer", ["basic", "bottleneck"])
@pytest.mark.parametrize("stem", [8, 4])
def test_doubled_channels_are_found(stem: int, layer: str, fitted: bool) -> None:
    narrow = resnet(stem, [8, 12], layer_type=layer)
    wide = double(narrow)
    torch.testing.assert_close(outputs(wide), outputs(narrow), rtol=1e-4, atol=1e-4)
    widths = {"hidden_sizes.0": 8, "hidden_sizes.1": 12} | ({} if stem == 8 else {"embedding_size": 4})
    found = width.narrow(wide, widths, moments(wide), Config(), batches() if fitted else None)
    assert found.config.hidden_sizes == [8, 12] and found.config.embedding_size == stem
    torch.testing.assert_close(outputs(found), outputs(wide), rtol=2e-3, atol=2e-3)


def test_fitted_norms_come_nearer_and_know_their_input() -> None:
    """After the fit a batch norm's running statistics are those of what it is fed: training goes on where eval was."""
    model = resnet(12, [12, 16])
    widths, errors = {"hidden_sizes.0": 8, "hidden_sizes.1": 10}, []
    for calibration in (None, batches()):
        narrow = width.narrow(model, widths, moments(model), Config(), calibration)
        errors.append(float((outputs(narrow) - outputs(model)).norm() / outputs(model).norm()))
    assert errors[1] < 0.96 * errors[0]
    seen = []
    norm = narrow.resnet.encoder.stages[1].layers[0].layer[1].normalization
    norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        for batch in batches():
            narrow(**batch)
    rows = torch.cat(seen).movedim(1, -1).flatten(0, -2)
    torch.testing.assert_close(rows.mean(0), norm.running_mean, rtol=0.05, atol=0.05)
    torch.testing.assert_close(rows.var(0), norm.running_var, rtol=0.1, atol=0.01)


def test_stock_transformers_load_it_bit_for_bit(tmp_path: Path) -> None:
    model = resnet(8, [8, 12])
    narrow = width.narrow(model, {"hidden_sizes.0": 5, "hidden_sizes.1": 7}, moments(model), Config(), batches())
    narrow.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(outputs(loaded), outputs(narrow))


def test_a_stem_for_small_images_is_kept() -> None:
    model = resnet(8, [8, 12])
    embedder = model.resnet.embedder
    embedder.pooler = nn.Identity()
    embedder.embedder.convolution = nn.Conv2d(3, 8, 3, padding=1, bias=False)
    narrow = width.narrow(model, {"hidden_sizes.0": 5, "hidden_sizes.1": 7}, moments(model), Config(), batches())
    convolution = narrow.resnet.embedder.embedder.convolution
    assert convolution.weight.shape == (5, 3, 3, 3) and convolution.stride == (1, 1)
    assert isinstance(narrow.resnet.embedder.pooler, nn.Identity)
    same = width.narrow(model, {}, moments(model), Config())
    torch.testing.assert_close(outputs(same), outputs(model), rtol=1e-4, atol=1e-4)


def test_groups() -> None:
    joined = {group.name: group for group in width.groups(resnet(8, [8, 12]))}
    assert {group.width for group in joined.values()} == {"hidden_sizes.0", "hidden_sizes.1"}
    assert joined["stage.0"].taps[0].module == "resnet.embedder"
    apart = {group.name: group for group in width.groups(resnet(6, [8, 12]))}
    assert apart["stem"].width == "embedding_size" and len(apart["stage.0"].taps) == 2


def test_what_cannot_be_narrowed() -> None:
    bottleneck = resnet(6, [16], layer_type="bottleneck")
    with pytest.raises(PlanError, match="multiple of 4"):
        width.narrow(bottleneck, {"hidden_sizes.0": 10}, moments(bottleneck), Config())
    model = resnet(6, [8, 12])
    found = moments(model)
    with pytest.raises(PlanError, match="drop the first shortcut"):
        width.narrow(model, {"hidden_sizes.0": 6}, found, Config())
    with pytest.raises(ConfigError, match="leverage"):
        width.narrow(model, {"hidden_sizes.0": 5}, found, Config(neurons="projection"))


@pytest.mark.parametrize("layer", ["basic", "bottleneck"])
def test_stages_narrow_it_and_stock_classes_load_it(layer: str, tmp_path: Path) -> None:
    model, config = resnet(8, [24, 32], layer_type=layer), Config(stages=2, epochs=1, quantile=0.2, max_drop=1.0)
    train = [{**batch, "labels": torch.arange(8) % 5} for batch in batches(2)]
    result = rmtkd.run(model, batches(), train, lambda model: 0.5, config, progress=False)
    kept = [stage.parameters for stage in result.history]
    assert kept[0] > kept[1] >= kept[2] and result.history[1].ranks
    planned = rmtkd.plan(model, batches(), config)
    inner = next(found for found in planned.layers if found.name == "stage.1.layer.0.inner")
    assert inner.rank * (4 if layer == "bottleneck" else 1) == planned.widths["hidden_sizes.1"]
    result.model.save_pretrained(tmp_path)
    stock = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(outputs(stock), outputs(result.model))
