"""Factor mode on whole models: which layers it takes, what a compressed model is, and what stays as it was."""

import copy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from rmtkd import factor
from rmtkd.calibration import calibrate
from rmtkd.compression import compress
from rmtkd.config import Config
from rmtkd.errors import ModelError, PlanError
from rmtkd.groups import Group, Tap
from rmtkd.modules import Projected, ProjectedConv2d, ProjectedEmbedding, ProjectedLinear
from rmtkd.rank import leading_eigenvectors
from rmtkernels.errors import RangeError, ShapeError
from tests.helpers import normal, same_bits

VOCABULARY, WIDTH = 64, 32
TOKENS = torch.arange(48).reshape(3, 16) * 7 % VOCABULARY


def tiny_bert() -> Any:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    return BertForSequenceClassification(config).eval()


def tiny_llama(tied: bool = True) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).eval()


def tiny_gpt2() -> Any:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=2, n_head=4, n_positions=64)
    return GPT2LMHeadModel(config).eval()


class Vision(nn.Module):
    """A convolution that can be projected, one that cannot, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.second = nn.Conv2d(16, 16, 3, stride=2, padding=1, bias=False)
        self.head = nn.Linear(16, 10)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.second(self.depthwise(self.first(images).relu()).relu()).relu()
        return self.head(hidden.mean((2, 3)))


class Twice(nn.Module):
    """One module under two names, which are both called."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList([self.first, nn.Linear(WIDTH, WIDTH)])
        self.listed = [self.first]  # where no Module looks

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[1](self.first(self.blocks[0](x).relu()).relu())


MODELS = {"bert": tiny_bert, "llama": tiny_llama, "gpt2": tiny_gpt2, "vision": lambda: Vision().eval(), "twice": Twice}


def inputs_of(model: nn.Module) -> Tensor:
    return (
        normal(4, 3, 8, 8) if isinstance(model, Vision) else normal(40, WIDTH) if isinstance(model, Twice) else TOKENS
    )


def outputs(model: Any) -> Tensor:
    with torch.no_grad():
        found = model(inputs_of(model))
    return found if isinstance(found, Tensor) else found.logits


def config_of(**changes: Any) -> Config:
    return Config(**({"mode": "factor", "multiple": 1} | changes))


def plan_of(model: nn.Module, config: Config, rank: int = 4) -> Any:
    """What `compress` reads of a plan, without timings, which could keep any layer dense."""
    groups = factor.groups(model, config)
    states = calibrate(model, [(inputs_of(model),)], groups, rows=1000, progress=False)
    covariances = {name: state.covariance(center=False) for name, state in states.items()}
    layers = [SimpleNamespace(name=n, rank=min(rank, len(c)), keep_dense="") for n, c in covariances.items()]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return SimpleNamespace(config=config, layers=layers, covariances=covariances, model_parameters=(parameters, 0))


def names_of(groups: list[Group]) -> list[str]:
    return [group.name for group in groups]


def test_groups_are_the_layers_with_a_tap_on_the_side_that_is_projected() -> None:
    model = tiny_bert()
    groups = factor.groups(model, config_of(side="input"))
    layers = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Embedding))]
    assert names_of(groups) == layers  # in the order of the model
    for group in groups:
        side = "output" if "embeddings" in group.name else "input"
        assert group == Group(group.name, (Tap(group.name, side),))
    assert {group.taps[0].side for group in factor.groups(model, config_of())} == {"output"}


def test_patterns_choose_and_exclude() -> None:
    model = tiny_bert()
    assert names_of(factor.groups(model, config_of(modules=("*.1.intermediate.dense",)))) == [
        "bert.encoder.layer.1.intermediate.dense"
    ]
    without = factor.groups(model, config_of(modules=("!*embeddings*", "!classifier")))
    both = factor.groups(model, config_of(modules=("*.encoder.*", "bert.pooler.*")))
    assert without == both and len(without) == 13
    with pytest.raises(
        ModelError, match=r"no layer of BertForSequenceClassification matches '\*\.mlp\.\*'; its layers: "
    ):
        factor.groups(model, config_of(modules=("*.encoder.*", "*.mlp.*")))
    with pytest.raises(ModelError, match="none of the 0 layers"):
        factor.groups(model, config_of(modules=("*", "!*")))


def test_layers_that_cannot_be_projected_are_skipped_with_the_reason() -> None:
    assert factor.skipped(tiny_bert(), config_of()) == {}
    vision = Vision()
    assert "16 groups" in factor.skipped(vision, config_of())["depthwise"]
    assert names_of(factor.groups(vision, config_of())) == ["first", "second", "head"]
    with pytest.raises(ModelError, match=r"none of the 1 layers.*\n  depthwise: its 16 groups"):
        factor.groups(vision, config_of(modules=("depth*",)))
    parametrizations.spectral_norm(vision.head)
    assert "remove_parametrizations" in factor.skipped(vision, config_of())["head"]
    vision.first.register_forward_hook(lambda *_: None)
    vision.second.forward = nn.Identity().forward
    assert all("hooks" in factor.skipped(vision, config_of())[name] for name in ("first", "second"))
    with pytest.raises(ModelError, match="first cannot be projected: it has hooks"):
        factor.layer(vision, "first", torch.eye(16, 4), "output")


def test_tied_weights_stay_dense_and_tied() -> None:
    tied, free = tiny_llama(), tiny_llama(tied=False)
    reasons = factor.skipped(tied, config_of())
    assert set(reasons) == {"lm_head", "model.embed_tokens"}
    assert "shares its parameters with model.embed_tokens" in reasons["lm_head"]
    assert factor.skipped(tied, config_of(modules=("lm_head", "*.up_proj"))) == {"lm_head": reasons["lm_head"]}
    assert factor.skipped(free, config_of()) == {}
    small: Any = factor.compress(tied, plan_of(tied, config_of()))
    assert small.lm_head.weight is small.model.embed_tokens.weight
    assert small.lm_head.weight is not tied.lm_head.weight
    with pytest.raises(ModelError, match="shares its parameters"):
        factor.layer(tied, "lm_head", torch.eye(VOCABULARY, 4), "output")


@pytest.mark.parametrize("which", sorted(MODELS))
@pytest.mark.parametrize("side", ["input", "output"])
def test_a_compressed_model_is_the_model_with_projected_layers(which: str, side: str) -> None:
    """Against a copy whose dense layers were replaced, one by one, by the dense form of the projected ones."""
    torch.manual_seed(0)
    model = MODELS[which]()
    plan = plan_of(model, config_of(side=side))
    before, bits = outputs(model), copy.deepcopy(model.state_dict())
    small = factor.compress(model, plan)
    assert all(same_bits(tensor, bits[name]) for name, tensor in model.state_dict().items())
    assert same_bits(outputs(model), before) and not any(isinstance(m, Projected) for m in model.modules())
    assert type(small) is type(model) and small.training == model.training

    expected = copy.deepcopy(model)
    for group in factor.groups(model, plan.config):
        module = model.get_submodule(group.name)
        rank = min(4, len(plan.covariances[group.name]))
        basis = leading_eigenvectors(plan.covariances[group.name], rank)
        dense, projected = factor.parameters(module, rank, group.taps[0].side)
        found = small.get_submodule(group.name)
        assert isinstance(found, Projected) is (projected < dense)
        if projected < dense:
            assert sum(p.numel() for p in found.parameters()) == projected
            layer = factor.layer(model, group.name, basis, group.taps[0].side)
            assert all(map(same_bits, layer.state_dict().values(), found.state_dict().values()))
            replace_everywhere(expected, expected.get_submodule(group.name), layer.to_dense())
    kept = {id(p) for m in small.modules() if not isinstance(m, Projected) for p in m.parameters(recurse=False)}
    shared = kept & {id(p) for p in model.parameters()}
    assert not shared
    assert torch.allclose(outputs(small), outputs(expected), atol=2e-6)
    assert not torch.allclose(outputs(small), before, atol=1e-4)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())


def replace_everywhere(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is old:
                setattr(parent, name, new)


def test_the_kinds_of_layers_become_their_projected_kinds() -> None:
    bert: Any = factor.compress(model := tiny_bert(), plan_of(model, config_of()))
    assert isinstance(bert.bert.embeddings.word_embeddings, ProjectedEmbedding)
    assert isinstance(bert.bert.embeddings.token_type_embeddings, nn.Embedding)  # 2 x 32: nothing to save
    assert isinstance(bert.bert.encoder.layer[0].intermediate.dense, ProjectedLinear)
    assert isinstance(bert.classifier, nn.Linear)
    vision: Any = factor.compress(net := Vision(), plan_of(net, config_of()))
    assert isinstance(vision.second, ProjectedConv2d) and isinstance(vision.depthwise, nn.Conv2d)
    gpt2: Any = factor.compress(lm := tiny_gpt2(), plan_of(lm, config_of()))
    assert isinstance(gpt2.transformer.h[0].attn.c_attn, ProjectedLinear)
    assert gpt2.transformer.h[0].attn.c_attn.out_features == 3 * WIDTH


def test_a_module_of_two_names_is_projected_once_and_stays_shared() -> None:
    model = Twice()
    assert names_of(factor.groups(model, config_of())) == ["first", "blocks.1"]
    small: Any = factor.compress(model, plan_of(model, config_of()))
    assert isinstance(small.first, ProjectedLinear)
    assert small.first is small.blocks[0] and small.first is small.listed[0]
    with pytest.raises(ModelError, match=r"blocks\.0 cannot be projected: it is projected already"):
        factor.layer(small, "blocks.0", torch.eye(WIDTH, 4), "output")


def test_a_model_that_is_one_layer() -> None:
    model = nn.Linear(WIDTH, WIDTH)
    plan = SimpleNamespace(
        config=config_of(),
        layers=[SimpleNamespace(name="", rank=4, keep_dense="")],
        covariances={"": torch.eye(WIDTH, dtype=torch.float64)},
    )
    assert names_of(factor.groups(model, config_of())) == [""]
    assert isinstance(factor.compress(model, plan), ProjectedLinear)


def test_layers_that_the_plan_keeps_stay_as_they_are() -> None:
    model = tiny_bert()
    plan = plan_of(model, config_of())
    plan.layers[5].keep_dense = "measured to be slower"
    kept = plan.layers[5].name
    del plan.covariances[kept]
    small = factor.compress(model, plan)
    assert type(small.get_submodule(kept)) is nn.Linear and isinstance(
        small.get_submodule(plan.layers[6].name), ProjectedLinear
    )


def test_later_stages_go_on_where_earlier_ones_ended() -> None:
    model = tiny_bert()
    early = config_of(modules=("*.layer.0.*",))
    small = factor.compress(model, plan_of(model, early))
    late = config_of(modules=("*.encoder.*",))
    assert len(factor.groups(small, late)) == 6
    assert set(factor.skipped(small, late).values()) == {"it is projected already"}
    smaller = factor.compress(small, plan_of(small, late))
    assert sum(isinstance(m, Projected) for m in smaller.modules()) == 12
    for name, tensor in small.state_dict().items():
        if ".layer.0." in name:
            assert same_bits(tensor, smaller.state_dict()[name])


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("side", ["input", "output"])
def test_training_keeps_the_projections_unless_they_are_to_be_trained(side: str, trainable: bool) -> None:
    model = tiny_bert()
    small: Any = factor.compress(model, plan_of(model, config_of(side=side, trainable=trainable))).train()
    before = copy.deepcopy(small.state_dict())
    optimiser = torch.optim.AdamW(small.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(2):
        optimiser.zero_grad()
        small(TOKENS, labels=torch.tensor([0, 1, 1])).loss.backward()
        optimiser.step()
    fixed = {f"{name}.{m.fixed}" for name, m in small.named_modules() if isinstance(m, Projected) and m.fixed}
    learned = {
        f"{name}.{factor_name}"
        for name, m in small.named_modules()
        if isinstance(m, Projected)
        for factor_name in m.factors
        if factor_name != m.fixed
    }
    assert bool(fixed) is not trainable and len(learned) >= 15
    assert all(same_bits(small.state_dict()[name], before[name]) for name in fixed)
    assert not any(torch.equal(small.state_dict()[name], before[name]) for name in learned)


def test_output_side_is_the_whitened_svd_where_there_is_no_bias() -> None:
    """Eckart and Young in the metric of the inputs (SVD-LLM): no rank-k weight has a lower output error."""
    weight = normal(24, 16, seed=1, dtype=torch.float64)
    x = normal(500, 16, seed=2, dtype=torch.float64) @ torch.diag(2.0 ** -torch.arange(16.0).double())
    module = nn.Linear(16, 24, bias=False, dtype=torch.float64)
    module.weight.data = weight
    y = x @ weight.T
    root = torch.linalg.cholesky(x.T @ x)
    left, values, right = torch.linalg.svd(weight @ root, full_matrices=False)
    whitened = left[:, :5] * values[:5] @ right[:5] @ torch.linalg.inv(root)
    basis = torch.linalg.eigh(y.T @ y).eigenvectors.flip(1)[:, :5]
    found = ProjectedLinear.from_dense(module, basis, "output")
    assert torch.allclose(found.weight, whitened, atol=1e-9)
    assert float((found(x) - y).detach().norm()) == pytest.approx(float(values[5:].norm()), rel=1e-9)


@pytest.mark.parametrize("make", [tiny_bert, tiny_gpt2, Vision])
@pytest.mark.parametrize("side", ["input", "output"])
def test_parameters_are_counted_without_building_the_layer(make: Any, side: Any) -> None:
    model = make()
    for group in factor.groups(model, config_of(side=side)):
        module = model.get_submodule(group.name)
        tapped = group.taps[0].side
        width = factor._width(module, tapped)
        rank = min(3, width)
        built = factor.layer(model, group.name, torch.eye(width, rank), tapped)
        counts = tuple(sum(p.numel() for p in m.parameters()) for m in (module, built))
        assert factor.parameters(module, rank, tapped) == counts


def test_compiles_whole() -> None:
    model = Vision().eval()
    small = factor.compress(model, plan_of(model, config_of()))
    compiled = torch.compile(small, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.allclose(compiled(inputs_of(model)), small(inputs_of(model)), atol=1e-6)


def test_compress_draws_no_random_numbers() -> None:
    model = tiny_bert()
    plan = plan_of(model, config_of())
    before = torch.random.get_rng_state()
    factor.compress(model, plan)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_plans_that_do_not_fit_are_refused() -> None:
    model = tiny_bert()
    good = plan_of(model, config_of(modules=("*.intermediate.dense",)))
    name = good.layers[0].name

    def bad(**changes: Any) -> Any:
        return SimpleNamespace(**(vars(good) | changes))

    def entry(**changes: Any) -> list[Any]:
        return [SimpleNamespace(**({"name": name, "rank": 4, "keep_dense": ""} | changes))]

    refused = {
        "mode 'width'": bad(config=replace(good.config, mode="width")),
        "that the model does not have": bad(layers=entry(name="encoder.9")),
        "no covariance": bad(covariances={}),
        "whose width is 64": bad(covariances={name: torch.eye(32)}),
        "rank 65": bad(layers=entry(rank=65)),
        "rank 0": bad(layers=entry(rank=0)),
        "a LayerNorm is not": bad(layers=entry(name="bert.embeddings.LayerNorm")),
    }
    for message, plan in refused.items():
        with pytest.raises(PlanError, match=message):
            factor.compress(model, plan)
    once = factor.compress(model, good)
    with pytest.raises(PlanError, match="projected already"):
        factor.compress(once, good)


def test_layer_refuses_what_does_not_fit() -> None:
    model = tiny_bert()
    with pytest.raises(ModelError, match=r"no module 'bert\.nothing'"):
        factor.layer(model, "bert.nothing", torch.eye(4), "output")
    with pytest.raises(ModelError, match="LayerNorm"):
        factor.layer(model, "bert.embeddings.LayerNorm", torch.eye(32, 4), "output")
    with pytest.raises(ShapeError, match=r"\(64, 1 … 64\)"):
        factor.layer(model, "bert.encoder.layer.0.intermediate.dense", torch.eye(32, 4), "output")
    with pytest.raises(RangeError, match="side"):
        factor.layer(model, "bert.embeddings.word_embeddings", torch.eye(32, 4), "input")


def test_the_public_compress_comes_here() -> None:
    model = tiny_bert()
    plan = plan_of(model, config_of())
    wanted, found = factor.compress(model, plan), compress(model, plan)
    assert all(map(same_bits, wanted.state_dict().values(), found.state_dict().values()))
