"""Folders of compressed models: bits that come back, refusals with reasons, and nothing half written."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from rmtkd import files
from rmtkd.config import Config
from rmtkd.errors import ConfigError, FileFormatError, ModelError
from rmtkd.factor import layer
from rmtkd.files import DESCRIPTION, WEIGHTS, load, save


class Small(nn.Module):
    """A projection of every kind, tied weights, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(20, 12, padding_idx=0)
        self.first = nn.Linear(12, 10)
        self.conv = nn.Conv2d(1, 6, 3, stride=2, padding=1, bias=False)
        self.last = nn.Linear(12, 30, bias=False)
        self.again = nn.Linear(12, 30, bias=False)
        self.again.weight = self.last.weight
        self.register_buffer("offset", torch.randn(3))

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.first(self.table(tokens))
        found: Tensor = self.conv(hidden[:, None]).mean() + self.again(self.table(tokens)).sum() + self.offset.sum()
        return found


def project(model: nn.Module, **ranks: int) -> nn.Module:
    for name, rank in ranks.items():
        name = name.replace("__", ".")
        module: Any = model.get_submodule(name)
        width = {nn.Embedding: "embedding_dim", nn.Linear: "out_features", nn.Conv2d: "out_channels"}.get(type(module))
        dim = getattr(module, width) if width else module.nf
        torch.manual_seed(rank)
        basis = torch.linalg.qr(torch.randn(dim, rank))[0]
        model.set_submodule(name, layer(model, name, basis, "output"))
    return model.eval()


def small() -> nn.Module:
    return project(Small(), table=5, first=4, conv=2)


def bert(**changes: Any) -> Any:
    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = BertConfig(vocab_size=40, max_position_embeddings=16, **{**sizes, **changes})
    return BertForSequenceClassification(config).eval()


def llama() -> Any:
    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def gpt2() -> Any:
    torch.manual_seed(3)
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=16)).eval()


def same_bits(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(
        left[n].dtype == right[n].dtype and torch.equal(left[n], right[n]) for n in left
    )


TOKENS = torch.tensor([[1, 5, 9, 3], [7, 0, 2, 2]])


def test_a_module_with_every_kind_of_projection(tmp_path: Path) -> None:
    model = small()
    save(model, tmp_path / "m", config=Config(mode="factor"))
    back = load(tmp_path / "m", model=Small())
    assert same_bits(model, back) and not back.training
    assert torch.equal(model(TOKENS), back(TOKENS))
    assert back.again.weight is back.last.weight
    assert str(back) == str(model)  # strides, padding, ranks
    frozen = [name for name, parameter in back.named_parameters() if not parameter.requires_grad]
    assert frozen == [name for name, parameter in model.named_parameters() if not parameter.requires_grad] != []


def test_the_instance_given_is_copied(tmp_path: Path) -> None:
    save(small(), tmp_path / "m")
    given = Small()
    before = {name: tensor.clone() for name, tensor in given.state_dict().items()}
    load(tmp_path / "m", model=given)
    assert same_bits(given, Small()) and given.state_dict().keys() == before.keys()


def test_a_layer_by_itself(tmp_path: Path) -> None:
    model = layer(nn.Sequential(nn.Linear(12, 10)), "0", torch.eye(10, 3), "output").eval()
    save(model, tmp_path / "m")
    assert same_bits(load(tmp_path / "m", model=nn.Linear(12, 10)), model)


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (bert, {"bert__encoder__layer__0__output__dense": 4, "bert__embeddings__word_embeddings": 8}),
        (llama, {"model__layers__1__mlp__down_proj": 4}),
        (gpt2, {"transformer__h__0__mlp__c_fc": 4}),
        (bert, {}),
    ],
)
def test_models_of_transformers_need_no_instance(
    tmp_path: Path, make: Callable[[], Any], names: dict[str, int]
) -> None:
    model: Any = project(make(), **names)
    save(model, tmp_path / "m")
    torch.manual_seed(9)
    random = torch.get_rng_state()
    back: Any = load(tmp_path / "m")
    assert torch.equal(torch.get_rng_state(), random)
    assert type(back) is type(model) and same_bits(model, back)
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, back(TOKENS).logits)
    assert (tmp_path / "m" / WEIGHTS).exists() == bool(names)
    if hasattr(model, "lm_head"):
        assert back.lm_head.weight is back.get_input_embeddings().weight
        assert back.generation_config.to_dict() == model.generation_config.to_dict()


def test_a_narrowed_model_is_a_stock_one(tmp_path: Path) -> None:
    model = bert(hidden_size=8)
    save(model, tmp_path / "m")
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path / "m").eval()
    assert torch.equal(stock(TOKENS).logits, model(TOKENS).logits)
    assert same_bits(load(tmp_path / "m", model=bert()), model)  # of the shape of the file, not of the instance


def test_stock_loaders_refuse_projected_models(tmp_path: Path) -> None:
    """They would fill what they do not know with random numbers."""
    save(project(bert(), bert__encoder__layer__0__output__dense=4), tmp_path / "m")
    with pytest.raises(OSError, match="safetensors"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "m")


def test_the_attention_of_the_instance_is_kept(tmp_path: Path) -> None:
    model = bert(attn_implementation="eager")
    save(model, tmp_path / "m")
    back: Any = load(tmp_path / "m", model=model)
    assert back.config._attn_implementation == "eager"
    assert torch.equal(back(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize("make", [bert, lambda: project(bert(), bert__encoder__layer__0__output__dense=4)])
def test_other_dtypes_come_back(tmp_path: Path, make: Callable[[], Any]) -> None:
    model = make().to(torch.bfloat16)
    save(model, tmp_path / "m")
    assert same_bits(load(tmp_path / "m"), model)


def test_a_view_is_written_whole(tmp_path: Path) -> None:
    model = nn.Linear(4, 3)
    both = torch.randn(2, 3, 4)
    model.weight.data = both[1]
    save(model, tmp_path / "m")
    assert torch.equal(load(tmp_path / "m", model=nn.Linear(4, 3)).weight, both[1])
    assert (tmp_path / "m" / WEIGHTS).stat().st_size < 500


def test_settings_and_plan_are_kept(tmp_path: Path) -> None:
    save(small(), tmp_path / "m", config=Config(mode="factor", quantile=0.4))
    found = json.loads((tmp_path / "m" / DESCRIPTION).read_text())
    assert Config.from_fields(found["config"]) == Config(mode="factor", quantile=0.4)
    assert [one["rank"] for one in found["projected"]] == [5, 4, 2]


# What is there already


def test_saving_again_replaces_the_whole(tmp_path: Path) -> None:
    save(bert(), tmp_path / "m")
    save(small(), tmp_path / "m")
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == [DESCRIPTION, WEIGHTS]
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "m", target_is_directory=True)
    for model in (bert(), small()):
        save(model, tmp_path / "link")
        assert (tmp_path / "link").is_symlink()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "m"]
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == [DESCRIPTION, WEIGHTS]


def test_what_rmtkd_did_not_write_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    save(small(), tmp_path / "empty")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("x")
    for name in ("mine", "file"):
        with pytest.raises(FileExistsError, match="nothing that rmtkd wrote"):
            save(small(), tmp_path / name)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("moment", ["save_file", "_to_disk", "_take_place"])
def test_a_failure_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    model = small()
    save(model, tmp_path / "m")

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no space left")

    if moment == "save_file":
        monkeypatch.setattr("safetensors.torch.save_file", fail)
    else:
        monkeypatch.setattr(files, moment, fail)
    with pytest.raises(OSError, match="no space"):
        save(project(Small(), table=7), tmp_path / "m")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    assert same_bits(load(tmp_path / "m", model=Small()), model)


def test_the_old_folder_comes_back_if_the_rename_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    save(model, tmp_path / "m")
    rename = Path.rename

    def second_fails(self: Path, target: Any) -> Any:
        if self.name.endswith(".partial"):
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", second_fails)
    with pytest.raises(OSError, match="no"):
        save(project(Small(), table=7), tmp_path / "m")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    assert same_bits(load(tmp_path / "m", model=Small()), model)


# Refusals


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(small(), tmp_path / "m")


@pytest.fixture
def stock(tmp_path: Path) -> Path:
    return save(bert(), tmp_path / "stock")


def describe(folder: Path, **changes: Any) -> None:
    found = json.loads((folder / DESCRIPTION).read_text())
    found.update(changes)
    (folder / DESCRIPTION).write_text(json.dumps({name: value for name, value in found.items() if value != "gone"}))


def change_layer(folder: Path, **changes: Any) -> None:
    found = json.loads((folder / DESCRIPTION).read_text())
    found["projected"][1].update(changes)
    (folder / DESCRIPTION).write_text(json.dumps(found))


def change_tensors(path: Path, **changes: Tensor | None) -> None:
    tensors = {**load_file(path), **{name.replace("__", "."): value for name, value in changes.items()}}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda f: (f / DESCRIPTION).unlink(), "no model that rmtkd saved: it has no rmtkd.json"),
        (lambda f: (f / DESCRIPTION).write_text("{"), "damaged"),
        (lambda f: (f / DESCRIPTION).write_text("[" * 10**5), "damaged"),
        (lambda f: (f / DESCRIPTION).write_bytes(b"\xff\xfe"), "damaged"),
        (lambda f: (f / DESCRIPTION).write_text("[]"), "no rmtkd.model file"),
        (lambda f: describe(f, format="eigentrack.recording"), "no rmtkd.model file"),
        (lambda f: describe(f, format_version=2), "version 2, this rmtkd reads 1: update it"),
        (lambda f: describe(f, format_version="gone"), "version None.*save the model anew"),
        (lambda f: describe(f, form="pickle"), "'pickle' for form"),
        (lambda f: describe(f, form="gone"), "must have the fields form, library"),
        (lambda f: describe(f, projected=3), "projected must be tuple"),
        (lambda f: describe(f, model=["x"]), r"model must be str, got \['x'\]"),
        (lambda f: change_layer(f, kind="Linear"), "first is a 'Linear', and there is no such layer"),
        (lambda f: change_layer(f, name="third"), "projects 'third', which the model has no layer for"),
        (lambda f: change_layer(f, name="offset"), "projects 'offset'"),
        (lambda f: change_layer(f, rank=3), "first has rank 4 and shape .10, 12., where the description says rank 3"),
        (lambda f: change_layer(f, rank="4"), r"projected\[1\].rank must be int, got '4'"),
        (lambda f: change_layer(f, fixed="bias"), "first is damaged .fixed must be"),
        (lambda f: change_layer(f, stride=[1, 1]), "first is damaged"),
        (lambda f: (f / WEIGHTS).unlink(), "missing or damaged"),
        (lambda f: os.truncate(f / WEIGHTS, 600), "missing or damaged"),
        (lambda f: os.truncate(f / WEIGHTS, 0), "missing or damaged"),
        (lambda f: (f / WEIGHTS).write_bytes(b"\xff" * 8 + b"x" * 64), "missing or damaged"),
        (lambda f: change_tensors(f / WEIGHTS, first__down=None), "first is damaged"),
        (lambda f: change_tensors(f / WEIGHTS, first__down=torch.zeros(4, 11)), "first has rank 4 and shape .10, 11."),
        (lambda f: change_tensors(f / WEIGHTS, first__down=torch.zeros(3, 12)), "first is damaged .down must be"),
        (lambda f: change_tensors(f / WEIGHTS, offset=None), "lacks tensors of the model: offset"),
        (lambda f: change_tensors(f / WEIGHTS, offset=torch.zeros(4)), "offset is .4,. in the file, .3,. in the model"),
        (lambda f: change_tensors(f / WEIGHTS, extra=torch.zeros(4)), "tensors that the model does not: extra"),
    ],
)
def test_a_damaged_folder_is_refused(folder: Path, spoil: Callable[[Path], Any], reason: str) -> None:
    spoil(folder)
    with pytest.raises(FileFormatError, match=reason):
        load(folder, model=Small())


def test_a_description_that_is_too_long_is_not_read(folder: Path) -> None:
    with (folder / DESCRIPTION).open("r+b") as file:
        file.truncate(files.MAX_DESCRIPTION + 1)
    with pytest.raises(FileFormatError, match="longer than"):
        load(folder, model=Small())


def test_settings_out_of_range_are_refused(folder: Path) -> None:
    describe(folder, config={"quantile": 2.0})
    with pytest.raises(ConfigError, match="quantile"):
        load(folder, model=Small())


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda f: (f / "model.safetensors").unlink(), "damaged"),
        (lambda f: os.truncate(f / "model.safetensors", 5000), "damaged"),
        (lambda f: (f / "config.json").write_text("{"), "damaged"),
        (lambda f: change_tensors(f / "model.safetensors", classifier__bias=None), "missing keys classifier.bias"),
        (lambda f: change_tensors(f / "model.safetensors", extra=torch.zeros(2)), "unexpected keys extra"),
        (lambda f: change_tensors(f / "model.safetensors", classifier__bias=torch.zeros(3)), "damaged|mismatched"),
        (lambda f: describe(f, model="AutoModel"), "no model 'AutoModel'"),
        (lambda f: describe(f, model="logging"), "no model 'logging'"),
        (lambda f: describe(f, model="BertForMaskedLM"), "does not hold a BertForMaskedLM"),
    ],
)
def test_a_damaged_stock_model_is_refused(stock: Path, spoil: Callable[[Path], Any], reason: str) -> None:
    spoil(stock)
    with pytest.raises(FileFormatError, match=reason):
        load(stock)


def test_pickles_are_not_read(stock: Path) -> None:
    (stock / "model.safetensors").unlink()
    torch.save(bert().state_dict(), stock / "pytorch_model.bin")
    with pytest.raises(FileFormatError, match="damaged"):
        load(stock)


def test_a_class_of_your_own_needs_an_instance(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"Small, which is not a class of transformers.*model="):
        load(folder)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "nowhere")


def test_an_instance_of_another_class_is_refused(stock: Path) -> None:
    with pytest.raises(FileFormatError, match=r"holds a Bert.*, not a Linear"):
        load(stock, model=nn.Linear(2, 2))
