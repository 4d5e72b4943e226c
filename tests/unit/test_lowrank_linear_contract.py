"""lowrank_linear: when the kernel runs, derivatives, transforms, autocast, and typed errors."""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import rmtkernels
from rmtkernels import BackendError, DeviceError, DtypeError, RmtkernelsError, ShapeError, lowrank_linear
from rmtkernels.reference import lowrank_linear_ref
from tests.helpers import normal, same_bits

LIMITS = sys.modules["rmtkernels.ops.lowrank_linear"]
Arguments = dict[str, Any]


class Calls(TorchDispatchMode):
    """Remembers whether the kernel ran, and whether a matrix product of PyTorch's did."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = self.products = False

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        self.kernel |= function is torch.ops.rmtkernels.lowrank_linear.default
        self.products |= function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return function(*arguments, **(options or {}))


def runs_the_kernel(*arguments: Any) -> bool:
    with Calls() as calls:
        lowrank_linear(*arguments)
    assert calls.kernel != calls.products
    return calls.kernel


def tensors(rows: int, dtype: torch.dtype = torch.float32, weights: torch.dtype | None = None) -> list[Tensor]:
    weights = dtype if weights is None else weights
    return [
        normal(rows, 384, seed=1, dtype=dtype),
        (normal(64, 384, seed=2) / 20).to(weights),
        (normal(48, 64, seed=3) / 8).to(weights),
        normal(48, seed=4, dtype=weights),
    ]


def two_linear(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None = None) -> Tensor:
    return functional.linear(functional.linear(x, down), up, bias)


@pytest.mark.parametrize("needs", range(4))
def test_a_gradient_is_computed_where_one_is_needed(needs: int) -> None:
    arguments = tensors(3)
    arguments[needs].requires_grad_()
    assert not runs_the_kernel(*arguments)
    y = lowrank_linear(*arguments)
    y.square().sum().backward()
    got = arguments[needs].grad
    arguments[needs].grad = None
    two_linear(*arguments).square().sum().backward()
    assert got is not None and torch.equal(got, arguments[needs].grad)


@pytest.mark.parametrize("gate", [torch.no_grad, torch.inference_mode])
def test_without_grad_mode_the_kernel_runs_though_weights_require_gradients(gate: Callable[[], Any]) -> None:
    arguments = [t.requires_grad_() for t in tensors(3)]
    with gate():
        assert runs_the_kernel(*arguments)
        y = lowrank_linear(*arguments)
    assert not y.requires_grad
    assert same_bits(y, torch.ops.rmtkernels.lowrank_linear(*(t.detach() for t in arguments)))


def test_the_kernel_runs_up_to_its_limits() -> None:
    assert runs_the_kernel(*tensors(LIMITS.MAX_ROWS))
    assert not runs_the_kernel(*tensors(LIMITS.MAX_ROWS + 1))
    assert runs_the_kernel(normal(32, 32), normal(3, 32), normal(5, 3))  # few elements, though many rows
    half, products = tensors(LIMITS.MAX_ROWS_BFLOAT16, torch.bfloat16), LIMITS.MAX_PRODUCTS_BFLOAT16
    assert runs_the_kernel(*half)
    rows = products // (half[1].numel() + half[2].numel())
    assert runs_the_kernel(*tensors(rows, torch.bfloat16))
    assert not runs_the_kernel(*tensors(rows + 1, torch.bfloat16))
    for x_dtype, dtype in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        assert runs_the_kernel(*tensors(200, x_dtype, dtype))
    for dtype in (torch.float64, torch.float16):
        assert not runs_the_kernel(*tensors(1, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("rows", [1, 300])
@pytest.mark.parametrize("shape", [(), (2,), (1, 2)])
def test_both_ways_agree_with_the_oracle(dtype: torch.dtype, rows: int, shape: tuple[int, ...]) -> None:
    _, *weights = tensors(rows, dtype)
    x = normal(*shape, rows, 384, dtype=dtype)
    y = lowrank_linear(x, *weights)
    assert y.dtype == dtype
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), lowrank_linear_ref(x, *weights), rtol=tolerance, atol=4 * tolerance)


@pytest.mark.parametrize("bias", [True, False])
def test_derivatives_of_first_and_second_order_in_both_directions(bias: bool) -> None:
    arguments = [normal(*shape, dtype=torch.float64) for shape in ((2, 3, 5), (4, 5), (6, 4), (6,))][: 3 + bias]
    for tensor in arguments:
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(lowrank_linear, arguments, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(lowrank_linear, arguments)


@pytest.mark.parametrize(("x_dtype", "dtype"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_gradients_of_mixed_dtypes(x_dtype: torch.dtype, dtype: torch.dtype) -> None:
    arguments = [t.requires_grad_() for t in tensors(3, x_dtype, dtype)]
    y = lowrank_linear(*arguments)
    assert y.dtype == x_dtype
    with torch.no_grad():
        torch.testing.assert_close(
            lowrank_linear(*arguments), y, rtol=2e-2 if x_dtype == torch.bfloat16 else 1e-5, atol=1e-5
        )
    y.float().square().sum().backward()
    wide = [t.detach().double().requires_grad_() for t in arguments]
    two_linear(*wide).square().sum().backward()
    for tensor, exact in zip(arguments, wide, strict=True):
        assert tensor.grad is not None and tensor.grad.dtype == tensor.dtype and exact.grad is not None
        scale = float(exact.grad.abs().max())
        torch.testing.assert_close(tensor.grad.double(), exact.grad, rtol=2e-2, atol=2e-2 * scale)


def test_forward_mode_without_a_gradient() -> None:
    x, *weights = tensors(2)
    tangent = normal(2, 384, seed=9)
    _, derivative = torch.func.jvp(lambda x: lowrank_linear(x, *weights), (x,), (tangent,))
    assert torch.equal(derivative, two_linear(tangent, *weights[:2]))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        derivative = torch.autograd.forward_ad.unpack_dual(lowrank_linear(dual, *weights)).tangent
    assert derivative is not None and torch.equal(derivative, two_linear(tangent, *weights[:2]))


def test_transforms_of_torch_func() -> None:
    x, down, up, bias = tensors(4)
    want = lowrank_linear(x, down, up, bias)
    assert same_bits(torch.vmap(lowrank_linear, (0, None, None, None))(x, down, up, bias), want)
    assert same_bits(torch.vmap(lowrank_linear, (1, None, None, None), 1)(x.T, down, up, bias), want.T)
    downs, ups = torch.stack([down, 2 * down]), torch.stack([up, up])
    batched = torch.vmap(lowrank_linear, (None, 0, 0, None))(x, downs, ups, bias)
    assert same_bits(batched, torch.stack([want, lowrank_linear(x, 2 * down, up, bias)]))
    nested = torch.vmap(torch.vmap(lowrank_linear, (0, None, None, None)), (None, 0, 0, None))(x, downs, ups, bias)
    assert same_bits(nested, batched)
    per_row = torch.vmap(torch.func.grad(lambda d, row: lowrank_linear(row, d, up, bias).sum()), (None, 0))(down, x)
    torch.testing.assert_close(per_row, up.sum(0)[None, :, None] * x[:, None])
    jacobian = torch.func.jacrev(lambda x: lowrank_linear(x, down, up, bias))(x[0])
    torch.testing.assert_close(jacobian, up @ down)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("rows", [1, 50])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_autocast_does_what_it_does_to_two_linear(grad: bool, rows: int, weights: torch.dtype) -> None:
    arguments = [t.requires_grad_(grad) for t in tensors(rows, weights=weights)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = lowrank_linear(*arguments)
        assert y.dtype == torch.bfloat16
        assert same_bits(y.detach(), two_linear(*arguments).detach())


def test_backends() -> None:
    arguments = tensors(3)
    exact = lowrank_linear_ref(*arguments)
    assert torch.equal(lowrank_linear(*arguments, backend="reference"), exact.float())
    assert same_bits(lowrank_linear(*arguments, backend="cpu"), lowrank_linear(*arguments))
    with rmtkernels.use_backend("reference"):
        assert torch.equal(lowrank_linear(*arguments), exact.float())
        with pytest.raises(ShapeError):
            lowrank_linear(arguments[0], *arguments[2:])
        y = lowrank_linear(arguments[0].requires_grad_(), *arguments[1:])
    y.sum().backward()
    torch.testing.assert_close(arguments[0].grad, (arguments[2] @ arguments[1]).sum(0).expand(3, 384))
    with pytest.raises(BackendError):
        lowrank_linear(*arguments, backend="cuda")


def test_devices_without_a_kernel_get_two_products() -> None:
    assert not runs_the_kernel(*(t.to("meta") for t in tensors(2)))
    assert lowrank_linear(*(t.to("meta") for t in tensors(2))).shape == (2, 48)


MISTAKES: dict[str, tuple[type[RmtkernelsError], Callable[[Arguments], Arguments]]] = {
    "x 0-D": (ShapeError, lambda a: {"x": torch.tensor(1.0)}),
    "x of another width": (ShapeError, lambda a: {"x": a["x"][:, 1:]}),
    "x transposed": (ShapeError, lambda a: {"x": a["x"].T}),
    "down 1-D": (ShapeError, lambda a: {"down": a["down"][0]}),
    "down 3-D": (ShapeError, lambda a: {"down": a["down"][None]}),
    "down transposed": (ShapeError, lambda a: {"down": a["down"].T}),
    "up 1-D": (ShapeError, lambda a: {"up": a["up"][0]}),
    "up transposed": (ShapeError, lambda a: {"up": a["up"].T}),
    "up of another rank": (ShapeError, lambda a: {"up": a["up"][:, 1:]}),
    "bias too short": (ShapeError, lambda a: {"bias": a["bias"][1:]}),
    "bias of one": (ShapeError, lambda a: {"bias": a["bias"][:1]}),
    "bias 0-D": (ShapeError, lambda a: {"bias": a["bias"][0]}),
    "bias 2-D": (ShapeError, lambda a: {"bias": a["bias"][None]}),
    "x whole numbers": (DtypeError, lambda a: {"x": a["x"].int()}),
    "x complex": (DtypeError, lambda a: {"x": a["x"].cfloat()}),
    "all whole numbers": (DtypeError, lambda a: {name: t.int() for name, t in a.items()}),
    "x float64": (DtypeError, lambda a: {"x": a["x"].double()}),
    "x float16": (DtypeError, lambda a: {"x": a["x"].half()}),
    "weights float64": (DtypeError, lambda a: {name: a[name].double() for name in ("down", "up", "bias")}),
    "weights float16": (DtypeError, lambda a: {name: a[name].half() for name in ("down", "up", "bias")}),
    "weights of 8 bits": (DtypeError, lambda a: {n: a[n].to(torch.float8_e4m3fn) for n in ("down", "up", "bias")}),
    "up bfloat16": (DtypeError, lambda a: {"up": a["up"].bfloat16()}),
    "bias bfloat16": (DtypeError, lambda a: {"bias": a["bias"].bfloat16()}),
    "x on another device": (DeviceError, lambda a: {"x": a["x"].to("meta")}),
    "down on another device": (DeviceError, lambda a: {"down": a["down"].to("meta")}),
    "up on another device": (DeviceError, lambda a: {"up": a["up"].to("meta")}),
    "bias on another device": (DeviceError, lambda a: {"bias": a["bias"].to("meta")}),
}


@pytest.mark.parametrize("name", MISTAKES)
@pytest.mark.parametrize("rows", [3, 500])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("backend", [None, "reference"])
def test_a_mistake_is_named(name: str, rows: int, grad: bool, backend: str | None) -> None:
    good = dict(zip(("x", "down", "up", "bias"), (normal(rows, 9), normal(4, 9), normal(5, 4), normal(5)), strict=True))
    error, change = MISTAKES[name]
    changed = {**good, **change(good)}
    for tensor in changed.values():
        tensor.requires_grad_(grad and tensor.dtype.is_floating_point and tensor.element_size() > 1)
    with pytest.raises(error):
        lowrank_linear(**changed, backend=backend)


@pytest.mark.parametrize("name", [name for name in MISTAKES if "device" not in name])
def test_the_raw_operator_raises_too(name: str) -> None:
    good = {"x": normal(3, 9), "down": normal(4, 9), "up": normal(5, 4), "bias": normal(5)}
    with pytest.raises(RuntimeError):
        torch.ops.rmtkernels.lowrank_linear(**{**good, **MISTAKES[name][1](good)})


@pytest.mark.parametrize("freed", range(4))
def test_freed_memory_is_refused(freed: int) -> None:
    arguments = tensors(2)
    arguments[freed].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="no memory"):
        lowrank_linear(*arguments)


def test_sparse_tensors_are_refused() -> None:
    x, *weights = tensors(2)
    with pytest.raises((RuntimeError, NotImplementedError)):
        lowrank_linear(x.to_sparse(), *weights)
    with pytest.raises((RuntimeError, NotImplementedError)):
        lowrank_linear(x, weights[0].to_sparse(), *weights[1:])
