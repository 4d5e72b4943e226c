"""ProjectedLinear, ProjectedEmbedding, ProjectedConv2d against float64 compositions of the dense layer."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from transformers.pytorch_utils import Conv1D

from rmtkd.errors import ModelError
from rmtkd.modules import Projected, ProjectedConv2d, ProjectedEmbedding, ProjectedLinear
from rmtkernels.errors import DtypeError, RangeError, ShapeError
from tests.helpers import normal, same_bits

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
SIDES = ("input", "output")
ROUNDING = {torch.float32: 2.0**-23, torch.float64: 2.0**-52, torch.bfloat16: 2.0**-7}


def orthonormal(width: int, rank: int, seed: int = 7) -> Tensor:
    return torch.linalg.qr(normal(width, rank, seed=seed, dtype=torch.float64))[0]


def fill(module: Any, seed: int = 0) -> Any:
    """Normal weights, scaled so that outputs are of size one, in eval mode."""
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            fan = max(1, parameter.numel() // len(parameter))
            parameter.copy_(normal(*parameter.shape, seed=seed + i, dtype=parameter.dtype) / fan**0.5)
    return module.eval()


def linear(d_in: int = 9, d_out: int = 7, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    made: nn.Linear = fill(nn.Linear(d_in, d_out, bias, dtype=dtype))
    return made


def near(found: Tensor, wanted: Tensor, roundings: float = 16) -> bool:
    """To a few roundings of the largest entry."""
    assert found.shape == wanted.shape
    error = float((found.detach().double() - wanted.detach().double()).abs().max()) if found.numel() else 0.0
    size = float(wanted.detach().abs().max()) if wanted.numel() else 0.0
    return error <= roundings * ROUNDING[found.dtype] * max(size, 1.0)


def projected_outputs(module: nn.Module, basis: Tensor, side: str, x: Tensor, channels: int = -1) -> Tensor:
    """What a layer projected on one side computes, by its definition: float64, the projector as a full matrix."""
    exact = copy.deepcopy(module).double()
    projector = basis.double() @ basis.double().T

    def onto(rows: Tensor) -> Tensor:
        return (rows.movedim(channels, -1) @ projector).movedim(-1, channels)

    found: Tensor = exact(onto(x.double())) if side == "input" else onto(exact(x.double()))
    return found


CASES: dict[str, Callable[[], tuple[Projected, Tensor]]] = {
    "linear input": lambda: (ProjectedLinear.from_dense(linear(), orthonormal(9, 4), "input"), normal(5, 9)),
    "linear output": lambda: (ProjectedLinear.from_dense(linear(), orthonormal(7, 3), "output"), normal(5, 9)),
    "linear, no bias": lambda: (ProjectedLinear(normal(4, 9), normal(7, 4, seed=1)), normal(40, 9)),
    "embedding": lambda: (
        ProjectedEmbedding.from_dense(fill(nn.Embedding(11, 6, padding_idx=2)), orthonormal(6, 3)),
        torch.tensor([[1, 2, 10], [0, 2, 2]]),
    ),
    "convolution input": lambda: (
        ProjectedConv2d.from_dense(fill(nn.Conv2d(5, 6, 3, 2, 1)), orthonormal(5, 2), "input"),
        normal(2, 5, 7, 6),
    ),
    "convolution output": lambda: (
        ProjectedConv2d.from_dense(fill(nn.Conv2d(5, 6, (3, 2), padding="same")), orthonormal(6, 2), "output"),
        normal(2, 5, 7, 6),
    ),
}


@pytest.fixture(params=sorted(CASES))
def case(request: pytest.FixtureRequest) -> tuple[Projected, Tensor]:
    return CASES[request.param]()


@given(
    d_in=st.integers(1, 40),
    d_out=st.integers(1, 40),
    share=st.floats(0, 1),
    side=st.sampled_from(SIDES),
    bias=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    basis_dtype=st.sampled_from((torch.float32, torch.float64)),
    leading=st.sampled_from([(), (1,), (3, 2), (30,), (0,)]),
    transposed=st.booleans(),
)
def test_linear_computes_what_the_projection_of_its_side_defines(
    d_in: int,
    d_out: int,
    share: float,
    side: Any,
    bias: bool,
    dtype: torch.dtype,
    basis_dtype: torch.dtype,
    leading: tuple[int, ...],
    transposed: bool,
) -> None:
    module: Any = linear(d_in, d_out, bias or transposed, dtype)
    width = d_in if side == "input" else d_out
    basis = orthonormal(width, max(1, round(share * width))).to(basis_dtype)
    x = normal(*leading, d_in, seed=5, dtype=dtype)
    wanted = projected_outputs(module, basis, side, x)
    if transposed:  # the same layer as transformers' Conv1D
        weight, offset = module.weight, module.bias
        module = Conv1D(d_out, d_in).to(dtype).eval()
        module.weight.data, module.bias.data = weight.detach().T.contiguous(), offset.detach().clone()
    with torch.no_grad():
        projected = ProjectedLinear.from_dense(module, basis, side)
        found = projected(x)
    assert found.dtype == dtype and projected.weight.dtype == dtype
    assert (projected.in_features, projected.out_features, projected.rank) == (d_in, d_out, basis.shape[1])
    assert near(found, wanted, roundings=24)


@given(
    channels=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 2), st.integers(1, 3)),
    padding=st.one_of(st.just("same"), st.just("valid"), st.tuples(st.integers(0, 2), st.integers(0, 2))),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    side=st.sampled_from(SIDES),
    bias=st.booleans(),
    rank=st.integers(1, 6),
)
@settings(max_examples=60)
def test_convolution_computes_what_the_projection_of_its_channels_defines(
    channels: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: Any,
    dilation: tuple[int, int],
    side: Any,
    bias: bool,
    rank: int,
) -> None:
    stride = (1, 1) if padding == "same" else stride
    module = fill(nn.Conv2d(*channels, kernel, stride, padding, dilation, bias=bias, dtype=torch.float64))
    width = channels[side == "output"]
    basis = orthonormal(width, min(rank, width))
    x = normal(2, channels[0], 8, 7, seed=5, dtype=torch.float64)
    projected = ProjectedConv2d.from_dense(module, basis, side)
    wanted = projected_outputs(module, basis, side, x, channels=1)
    assert near(projected(x), wanted) and near(projected(x[0]), wanted[0])
    assert near(projected.to_dense()(x), wanted)
    assert projected.kernel_size == kernel and (projected.in_channels, projected.out_channels) == channels


@given(words=st.integers(1, 30), width=st.integers(1, 12), rank=st.integers(1, 12), dtype=st.sampled_from(DTYPES))
def test_embedding_gives_projected_rows(words: int, width: int, rank: int, dtype: torch.dtype) -> None:
    module = fill(nn.Embedding(words, width, dtype=dtype))
    basis = orthonormal(width, min(rank, width))
    tokens = torch.arange(2 * words).reshape(2, -1) % words
    projected = ProjectedEmbedding.from_dense(module, basis)
    assert near(projected(tokens), module.weight.double()[tokens] @ basis @ basis.T)
    assert (projected.num_embeddings, projected.embedding_dim, projected.rank) == (words, width, basis.shape[1])


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_factors_are_rounded_once(side: Any, dtype: torch.dtype) -> None:
    module, basis = linear(9, 7, True, dtype), orthonormal(9 if side == "input" else 7, 4)
    weight, bias = module.weight.detach().double(), module.bias.detach().double()
    projected = ProjectedLinear.from_dense(module, basis, side)
    other, exact_bias = (weight @ basis, bias) if side == "input" else (basis.T @ weight, basis @ (basis.T @ bias))
    down, up = (basis.T, other) if side == "input" else (other, basis)
    slack = 2.0**-50  # the product itself may be summed in another order
    for found, wanted in ((projected.down, down), (projected.up, up), (projected.bias, exact_bias)):
        assert found is not None and found.is_contiguous() and found.dtype == dtype
        assert ((found.double() - wanted).abs() <= ROUNDING[dtype] / 2 * wanted.abs() + slack).all()


def test_to_dense_is_the_product_rounded_once(case: tuple[Projected, Tensor]) -> None:
    projected, x = case
    random = torch.random.get_rng_state()
    dense: Any = projected.to_dense()
    assert torch.equal(random, torch.random.get_rng_state())
    first, second = (projected.get_parameter(name).detach().double() for name in projected.factors)
    if isinstance(projected, ProjectedEmbedding):
        exact = first @ second.T
    else:
        exact = torch.einsum("ok...,kc...->oc...", second, first)
    assert type(dense) in (nn.Linear, nn.Embedding, nn.Conv2d)
    assert ((dense.weight.double() - exact).abs() <= 2.0**-24 * exact.abs() + 2.0**-50).all()
    assert dense.weight.requires_grad and dense.training is projected.training
    assert near(dense(x), projected(x)) and near(projected.weight, dense.weight)
    dense.weight.data.zero_()
    assert all(bool(tensor.any()) for tensor in projected.state_dict().values())  # no memory is shared


@pytest.mark.parametrize("side", SIDES)
def test_a_whole_basis_changes_nothing(side: Any) -> None:
    module = linear(8, 8, True, torch.float64)
    x = normal(6, 8, dtype=torch.float64)
    assert near(ProjectedLinear.from_dense(module, orthonormal(8, 8), side)(x), module(x))


def test_the_dense_layer_stays_as_it_is_and_shares_nothing() -> None:
    for module in (linear(8, 8, True, torch.float64), fill(nn.Conv2d(8, 8, 1, dtype=torch.float64))):
        basis = orthonormal(8, 8)
        for side in SIDES:
            before = [tensor.clone() for tensor in (*module.parameters(), basis)]
            random = torch.random.get_rng_state()
            projected: Any = (ProjectedLinear if isinstance(module, nn.Linear) else ProjectedConv2d).from_dense(
                module, basis, side
            )
            assert torch.equal(random, torch.random.get_rng_state())
            with torch.no_grad():
                for parameter in projected.parameters():
                    parameter.fill_(7)
            assert all(map(same_bits, before, (*module.parameters(), basis)))


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("trainable", [False, True])
def test_gradients_are_those_of_the_dense_composition(side: Any, trainable: bool) -> None:
    module, x, goal = linear(9, 7, True, torch.float64), normal(30, 9, dtype=torch.float64), normal(30, 7, seed=3)
    projected = ProjectedLinear.from_dense(
        module, orthonormal(9 if side == "input" else 7, 4), side, trainable=trainable
    )
    (projected(x) - goal).square().sum().backward()
    down, up, bias = (tensor.detach().clone().requires_grad_() for tensor in projected.parameters())
    (nn.functional.linear(x, up @ down, bias) - goal).square().sum().backward()
    fixed = None if trainable else {"input": "down", "output": "up"}[side]
    assert projected.fixed == fixed
    for name, composed in (("down", down), ("up", up), ("bias", bias)):
        found = projected.get_parameter(name)
        assert found.requires_grad is (name != fixed)
        if name == fixed:
            assert found.grad is None
        else:
            assert found.grad is not None and composed.grad is not None and near(found.grad, composed.grad, 256)


def test_training_moves_everything_but_the_projection(case: tuple[Projected, Tensor]) -> None:
    projected, x = case
    projected.train()
    before = copy.deepcopy(projected.state_dict())
    optimiser = torch.optim.AdamW(projected.parameters(), lr=0.1, weight_decay=0.5)
    projected(x).square().sum().backward()
    optimiser.step()
    for name, tensor in projected.state_dict().items():
        assert same_bits(tensor, before[name]) is (name == projected.fixed)


def test_the_weight_it_shows_has_the_gradient_of_its_factors(case: tuple[Projected, Tensor]) -> None:
    projected, _ = case
    projected.weight.square().sum().backward()
    learned = [projected.get_parameter(name) for name in projected.factors if name != projected.fixed]
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in learned)


def test_padding_gets_no_gradient() -> None:
    module: Any = fill(nn.Embedding(11, 6, padding_idx=2))
    with torch.no_grad():
        module.weight[2] = 0
    projected = ProjectedEmbedding.from_dense(module, orthonormal(6, 3))
    projected(torch.tensor([2, 3, 2])).sum().backward()
    assert projected.table.grad is not None and not projected.table.grad[2].any() and projected.table.grad[3].any()
    assert not projected(torch.tensor(2)).any()
    assert projected.to_dense().padding_idx == 2


@pytest.mark.parametrize("side", SIDES)
def test_what_was_frozen_stays_frozen_and_modes_are_kept(side: Any) -> None:
    module = linear().train()
    module.weight.requires_grad_(False)
    projected = ProjectedLinear.from_dense(module, orthonormal(9 if side == "input" else 7, 3), side, trainable=True)
    assert [projected.down.requires_grad, projected.up.requires_grad] == [False, False]
    assert projected.bias is not None and projected.bias.requires_grad
    assert projected.training and not ProjectedLinear.from_dense(module.eval(), orthonormal(9, 3), "input").training


def test_state_dict_round_trip(case: tuple[Projected, Tensor]) -> None:
    projected, x = case
    state = projected.state_dict()
    assert set(state) == {*projected.factors, *(["bias"] if getattr(projected, "bias", None) is not None else [])}
    for assign in (False, True):
        other = copy.deepcopy(projected)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        other.load_state_dict(copy.deepcopy(state), assign=assign)
        assert same_bits(other(x), projected(x))
        assert [p.requires_grad for p in other.parameters()] == [p.requires_grad for p in projected.parameters()]


def test_a_state_of_another_rank_is_refused() -> None:
    with pytest.raises(RuntimeError, match="size mismatch"):
        ProjectedLinear(normal(4, 9), normal(7, 4)).load_state_dict(
            ProjectedLinear(normal(3, 9), normal(7, 3)).state_dict()
        )


def test_deepcopy_is_independent(case: tuple[Projected, Tensor]) -> None:
    projected, x = case
    twin = copy.deepcopy(projected)
    wanted = projected(x).detach().clone()
    with torch.no_grad():
        for parameter in projected.parameters():
            parameter.zero_()
    assert same_bits(twin(x).detach(), wanted) and twin.fixed == projected.fixed
    assert [p.requires_grad for p in twin.parameters()] == [p.requires_grad for p in projected.parameters()]


def test_moves_to_other_dtypes(case: tuple[Projected, Tensor]) -> None:
    projected, x = case
    wanted = projected(x)
    for dtype in (torch.float64, torch.bfloat16):
        moved = copy.deepcopy(projected).to(dtype)
        found = moved(x.to(dtype) if x.is_floating_point() else x)
        assert found.dtype == dtype and float((found - wanted).abs().max()) < 0.1 * float(wanted.abs().max())
        assert moved.to_dense().weight.dtype == dtype


def test_lives_on_the_meta_device(case: tuple[Projected, Tensor]) -> None:
    projected, x = case
    abstract = copy.deepcopy(projected).to("meta")
    assert abstract(x.to("meta")).shape == projected(x).shape
    assert abstract.to_dense().weight.is_meta
    real = abstract.to_empty(device="cpu")
    real.load_state_dict(projected.state_dict())
    assert same_bits(real(x), projected(x))


def test_a_dense_layer_on_the_meta_device_gives_the_shapes() -> None:
    with torch.device("meta"):
        found = ProjectedLinear.from_dense(nn.Linear(9, 7), torch.empty(7, 3), "output")
    assert found.down.is_meta and found.down.shape == (3, 9) and found.up.shape == (7, 3)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_without_a_graph_break(case: tuple[Projected, Tensor], backend: str) -> None:
    projected, x = case
    torch.compiler.reset()
    compiled = torch.compile(projected, fullgraph=True, backend=backend)
    with torch.no_grad():
        assert same_bits(compiled(x), projected(x))
    learned = [parameter for parameter in projected.parameters() if parameter.requires_grad]
    wanted = torch.autograd.grad(projected(x).square().sum(), learned)
    found = torch.autograd.grad(compiled(x).square().sum(), learned)
    assert all(map(near, found, wanted))


def test_factors_of_any_decomposition_will_do() -> None:
    """Plain SVD: the best rank-k weight, whatever the activations."""
    module = linear(9, 7)
    left, values, right = torch.linalg.svd(module.weight.detach(), full_matrices=False)
    projected = ProjectedLinear(values[:3, None] * right[:3], left[:, :3], module.bias)
    assert projected.fixed is None and all(parameter.requires_grad for parameter in projected.parameters())
    error = torch.linalg.matrix_norm(projected.to_dense().weight - module.weight)
    assert float(error) == pytest.approx(float(values[3:].norm()), rel=1e-5)


def test_contiguous_tensors_are_taken_without_a_copy() -> None:
    down, up = normal(4, 9), normal(4, 7).T
    projected = ProjectedLinear(down, up)
    assert projected.down.data_ptr() == down.data_ptr() and projected.up.is_contiguous()


def test_code_that_reads_the_weight_works() -> None:
    """The fast path of nn.TransformerEncoderLayer does not call its layers."""
    torch.manual_seed(0)
    layer: Any = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = normal(2, 5, 8)
    layer.linear1 = ProjectedLinear.from_dense(layer.linear1, orthonormal(16, 5), "output")
    with torch.no_grad():
        found = layer(x)
        layer.linear1 = layer.linear1.to_dense()
        assert near(found, layer(x))


def parametrized() -> nn.Module:
    return parametrizations.weight_norm(nn.Linear(9, 7))


def pruned() -> nn.Module:
    module = nn.Linear(9, 7)
    prune.random_unstructured(module, "weight", 0.5)
    return module


REFUSED: dict[str, tuple[Callable[[], nn.Module], type[Any], str]] = {
    "parametrized": (parametrized, ProjectedLinear, "parametrizations"),
    "pruned": (pruned, ProjectedLinear, "pruning"),
    "attention's": (lambda: nn.MultiheadAttention(8, 2).out_proj, ProjectedLinear, "NonDynamicallyQuantizableLinear"),
    "lazy": (lambda: nn.LazyLinear(7), ProjectedLinear, "LazyLinear"),
    "again": (lambda: ProjectedLinear(normal(4, 9), normal(7, 4)), ProjectedLinear, "ProjectedLinear"),
    "norm": (lambda: nn.LayerNorm(9), ProjectedLinear, "LayerNorm"),
    "another kind": (lambda: nn.Embedding(9, 9), ProjectedLinear, "Linear or Conv1D, got Embedding"),
    "grouped": (lambda: nn.Conv2d(9, 9, 3, groups=3), ProjectedConv2d, "3 groups"),
    "reflecting": (lambda: nn.Conv2d(9, 9, 3, padding=1, padding_mode="reflect"), ProjectedConv2d, "reflect"),
    "bounded": (lambda: nn.Embedding(9, 9, max_norm=1.0), ProjectedEmbedding, "max_norm"),
    "sparse": (lambda: nn.Embedding(9, 9, sparse=True), ProjectedEmbedding, "sparse"),
}


@pytest.mark.parametrize("which", sorted(REFUSED))
def test_layers_that_compute_something_else_are_refused(which: str) -> None:
    make, cls, reason = REFUSED[which]
    with pytest.raises(ModelError, match=reason):
        cls.from_dense(make(), orthonormal(9, 3), "output")


def test_bad_bases_and_sides_are_refused() -> None:
    for basis in (orthonormal(9, 3), torch.zeros(7, 8), torch.zeros(7, 0), torch.zeros(7)):
        with pytest.raises(ShapeError, match=r"basis of this output must be \(7, 1 … 7\)"):
            ProjectedLinear.from_dense(linear(), basis, "output")
    wrong: Any = "left"
    with pytest.raises(RangeError, match="side"):
        ProjectedLinear.from_dense(linear(), orthonormal(9, 3), wrong)
    with pytest.raises(RangeError, match="side"):
        ProjectedEmbedding.from_dense(nn.Embedding(9, 9), orthonormal(9, 3), "input")


def test_bad_factors_are_refused() -> None:
    wide, narrow = normal(4, 9), normal(7, 4)
    window = normal(4, 9, 3, 3)
    bad: list[tuple[type[Exception], Callable[[], object]]] = [
        (ShapeError, lambda: ProjectedLinear(wide, normal(7, 5))),
        (ShapeError, lambda: ProjectedLinear(wide[0], narrow)),
        (ShapeError, lambda: ProjectedLinear(wide, narrow, normal(4))),
        (DtypeError, lambda: ProjectedLinear(wide, narrow.double())),
        (DtypeError, lambda: ProjectedLinear(wide, narrow, normal(7).double())),
        (DtypeError, lambda: ProjectedLinear(wide.long(), narrow.long())),
        (RangeError, lambda: ProjectedLinear(wide, narrow, fixed="table")),
        (ShapeError, lambda: ProjectedEmbedding(wide, narrow)),
        (RangeError, lambda: ProjectedEmbedding(wide.T, narrow, padding_idx=9)),
        (ShapeError, lambda: ProjectedConv2d(window, normal(7, 4, 3, 3))),
        (ShapeError, lambda: ProjectedConv2d(window, normal(7, 5, 1, 1))),
        (ShapeError, lambda: ProjectedConv2d(window, narrow)),
    ]
    for error, make in bad:
        with pytest.raises(error):
            make()


def test_says_what_it_is() -> None:
    assert "in_features=9, out_features=7, rank=4, bias=False, fixed=None" in repr(CASES["linear, no bias"]()[0])
    assert "11, 6, rank=3, padding_idx=2, fixed='up'" in repr(CASES["embedding"]()[0])
    assert "5, 6, kernel_size=(3, 3), rank=2, stride=(2, 2)" in repr(CASES["convolution input"]()[0])
