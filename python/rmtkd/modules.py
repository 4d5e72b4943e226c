"""ProjectedLinear, ProjectedEmbedding, ProjectedConv2d: layers whose weight is the product of two thin factors."""

from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from rmtkd.projection import Side, kind_of, product, project_bias, project_weight, refuse_others
from rmtkernels import lowrank_linear
from rmtkernels.errors import DtypeError, RangeError, ShapeError


class Projected(nn.Module):
    """What the projected layers share. One of the two factors of most of them is a projection and is not trained.

    A projection P has orthonormal columns, the leading eigenvectors of a second moment of activations. Of the dense
    layer y = W x + b the input side keeps W P Pᵀ x + b, with P in the first factor, and the output side P Pᵀ (W x + b),
    with P in the second. So the *first* factor is fixed on the input side, and the *second* on the output side. The
    bias goes with the outputs because P is of outputs that have it in them: docs/rmtkd.md, *Sides*, has the figures.

    Attributes:
        fixed: name of the factor that is the projection: a parameter that does not require a gradient, until somebody
            asks for one. None: both factors are weights like any other.
        weight: the dense weight in the layout of `nn.Linear`, `nn.Embedding` or `nn.Conv2d`, with its gradient,
            computed at every reading: for code that reads a layer's weight beside calling the layer.
    """

    factors: tuple[str, str]  # names of the first and of the second
    fixed: str | None

    def _register(self, first: Tensor, second: Tensor, fixed: str | None) -> None:
        for name, tensor in zip(self.factors, (first, second), strict=True):
            if not tensor.is_floating_point():
                raise DtypeError(f"{name} must be of a floating dtype, got {tensor.dtype}")
        if first.dtype != second.dtype:
            raise DtypeError(f"{' and '.join(self.factors)} must have one dtype, got {first.dtype} and {second.dtype}")
        if fixed not in (None, *self.factors):
            raise RangeError(f"fixed must be {' or '.join(map(repr, self.factors))} or None, got {fixed!r}")
        self.fixed = fixed
        for name, tensor in zip(self.factors, (first, second), strict=True):
            self.register_parameter(name, nn.Parameter(tensor.detach().contiguous(), requires_grad=name != fixed))

    def _register_bias(self, bias: Tensor | None, width: int, dtype: torch.dtype) -> None:
        if bias is not None and bias.shape != (width,):
            raise ShapeError(f"bias must be ({width},), got {tuple(bias.shape)}")
        if bias is not None and bias.dtype != dtype:
            raise DtypeError(f"bias must have the factors' dtype {dtype}, got {bias.dtype}")
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach().contiguous()))


class ProjectedLinear(Projected):
    """y = up (down x) + bias, by `rmtkernels.lowrank_linear`.

    Args:
        down: (k, d_in).
        up: (d_out, k), of down's dtype.
        bias: (d_out,), of down's dtype.
        fixed: "down" or "up" if that factor is a projection that is not trained.

    The tensors become the parameters `down`, `up` and `bias` without a copy, if they are contiguous.

    Raises:
        ShapeError, DtypeError, RangeError: on bad arguments.
    """

    factors = ("down", "up")
    down: nn.Parameter
    up: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, down: Tensor, up: Tensor, bias: Tensor | None = None, *, fixed: str | None = None) -> None:
        super().__init__()
        if down.dim() != 2 or up.dim() != 2 or up.shape[1] != down.shape[0]:
            raise ShapeError(f"down must be (k, d_in) and up (d_out, k), got {tuple(down.shape)} and {tuple(up.shape)}")
        self._register(down, up, fixed)
        self._register_bias(bias, len(up), up.dtype)

    @classmethod
    def from_dense(cls, module: nn.Module, basis: Tensor, side: Side, *, trainable: bool = False) -> "ProjectedLinear":
        """Projects an `nn.Linear`, or a `Conv1D` of transformers (whose weight is transposed).

        Args:
            module: is not changed, and shares no memory with the result.
            basis: (d_in, k) or (d_out, k) by side, orthonormal columns.
            side: "input" or "output", see `Projected`.
            trainable: whether the projection is trained as well.

        Raises:
            ModelError: if the module cannot be projected.
            ShapeError, RangeError: if the basis or the side does not fit.
        """
        refuse_others(module, "Linear", "Conv1D")
        weight = module.get_parameter("weight").detach()
        down, up = project_weight(weight.T if kind_of(module) == "Conv1D" else weight, basis, side)
        bias = project_bias(getattr(module, "bias", None), basis, side)
        return _taking_over(module, cls(down, up, bias, fixed=_fixed(cls.factors, side, trainable)))

    @property
    def rank(self) -> int:
        return len(self.down)

    @property
    def in_features(self) -> int:
        return self.down.shape[1]

    @property
    def out_features(self) -> int:
        return len(self.up)

    @property
    def weight(self) -> Tensor:
        return self.up @ self.down

    def forward(self, x: Tensor) -> Tensor:
        """(..., d_in) -> (..., d_out)."""
        return lowrank_linear(x, self.down, self.up, self.bias)

    def to_dense(self) -> nn.Linear:
        dense = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        return _filled(dense, product(self.up, self.down), self)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"bias={self.bias is not None}, fixed={self.fixed!r}"
        )


class ProjectedEmbedding(Projected):
    """up table[token]: a narrower table, and the projection back to the model's width.

    Args:
        table: (V, k).
        up: (d, k), of the table's dtype.
        padding_idx: as in `nn.Embedding`: this row of the table gets no gradient.
        fixed: "table" or "up" if that factor is not trained.

    The tensors become the parameters `table` and `up` without a copy, if they are contiguous.

    Raises:
        ShapeError, DtypeError, RangeError: on bad arguments.
    """

    factors = ("table", "up")
    table: nn.Parameter
    up: nn.Parameter

    def __init__(self, table: Tensor, up: Tensor, *, padding_idx: int | None = None, fixed: str | None = None) -> None:
        super().__init__()
        if table.dim() != 2 or up.dim() != 2 or up.shape[1] != table.shape[1]:
            raise ShapeError(f"table must be (V, k) and up (d, k), got {tuple(table.shape)} and {tuple(up.shape)}")
        if padding_idx is not None and not 0 <= padding_idx < len(table):
            raise RangeError(f"padding_idx must be a row of the table's {len(table)}, got {padding_idx}")
        self._register(table, up, fixed)
        self.padding_idx = padding_idx

    @classmethod
    def from_dense(
        cls, module: nn.Module, basis: Tensor, side: Side = "output", *, trainable: bool = False
    ) -> "ProjectedEmbedding":
        """Projects the rows of an `nn.Embedding`, which are its outputs: there is no input side.

        Args:
            module: is not changed, and shares no memory with the result.
            basis: (d, k), orthonormal columns.
            side: "output".
            trainable: whether the projection is trained as well.

        Raises:
            ModelError: if the module cannot be projected.
            ShapeError, RangeError: if the basis or the side does not fit.
        """
        refuse_others(module, "Embedding")
        if side != "output":
            raise RangeError(f'an embedding is projected on the side "output", got {side!r}')
        down, up = project_weight(module.get_parameter("weight").detach().T, basis, side)
        padding_idx: int | None = getattr(module, "padding_idx")  # noqa: B009
        fixed = _fixed(cls.factors, side, trainable)
        return _taking_over(module, cls(down.T, up, padding_idx=padding_idx, fixed=fixed))

    @property
    def rank(self) -> int:
        return self.table.shape[1]

    @property
    def num_embeddings(self) -> int:
        return len(self.table)

    @property
    def embedding_dim(self) -> int:
        return len(self.up)

    @property
    def weight(self) -> Tensor:
        return self.table @ self.up.T

    def forward(self, tokens: Tensor) -> Tensor:
        """(...) whole numbers -> (..., d)."""
        return functional.linear(functional.embedding(tokens, self.table, self.padding_idx), self.up)

    def to_dense(self) -> nn.Embedding:
        dense = nn.Embedding(self.num_embeddings, self.embedding_dim, self.padding_idx, device="meta")
        return _filled(dense, product(self.table, self.up.T), self)

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f"padding_idx={self.padding_idx}, "
        return f"{self.num_embeddings}, {self.embedding_dim}, rank={self.rank}, {padding}fixed={self.fixed!r}"


class ProjectedConv2d(Projected):
    """Two convolutions, one of which is 1 × 1 and is the projection of the channels.

    Args:
        down: (k, C_in, h, w).
        up: (C_out, k, h', w'), of down's dtype. One of the two is 1 × 1.
        bias: (C_out,), of down's dtype.
        stride, padding, dilation: of the one that is not 1 × 1, or of `down` if both are; as in `nn.Conv2d`.
        fixed: "down" or "up" if that factor is a projection that is not trained.

    The tensors become the parameters `down`, `up` and `bias` without a copy, if they are contiguous.

    Raises:
        ShapeError, DtypeError, RangeError: on bad arguments.
    """

    factors = ("down", "up")
    down: nn.Parameter
    up: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        down: Tensor,
        up: Tensor,
        bias: Tensor | None = None,
        *,
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] | str = (0, 0),
        dilation: tuple[int, int] = (1, 1),
        fixed: str | None = None,
    ) -> None:
        super().__init__()
        if (
            down.dim() != 4
            or up.dim() != 4
            or up.shape[1] != len(down)
            or (1, 1) not in (tuple(down.shape[2:]), tuple(up.shape[2:]))
        ):
            raise ShapeError(
                "down must be (k, C_in, h, w) and up (C_out, k, h', w'), one of them 1 × 1, got "
                f"{tuple(down.shape)} and {tuple(up.shape)}"
            )
        self._register(down, up, fixed)
        self._register_bias(bias, len(up), up.dtype)
        self.stride, self.padding, self.dilation = stride, padding, dilation

    @classmethod
    def from_dense(cls, module: nn.Module, basis: Tensor, side: Side, *, trainable: bool = False) -> "ProjectedConv2d":
        """Projects the channels of an `nn.Conv2d`: C → k → convolution on the input side, the reverse on the output's.

        Args:
            module: is not changed, and shares no memory with the result.
            basis: (C_in, k) or (C_out, k) by side, orthonormal columns.
            side: "input" or "output", see `Projected`.
            trainable: whether the projection is trained as well.

        Raises:
            ModelError: if the module cannot be projected.
            ShapeError, RangeError: if the basis or the side does not fit.
        """
        refuse_others(module, "Conv2d")
        assert isinstance(module, nn.Conv2d)
        down, up = project_weight(module.weight.detach(), basis, side)
        geometry: dict[str, Any] = {name: getattr(module, name) for name in ("stride", "padding", "dilation")}
        bias = project_bias(module.bias, basis, side)
        return _taking_over(module, cls(down, up, bias, **geometry, fixed=_fixed(cls.factors, side, trainable)))

    @property
    def rank(self) -> int:
        return len(self.down)

    @property
    def in_channels(self) -> int:
        return self.down.shape[1]

    @property
    def out_channels(self) -> int:
        return len(self.up)

    @property
    def kernel_size(self) -> tuple[int, int]:
        height, width = (self.up if self._up_is_spatial else self.down).shape[2:]
        return height, width

    @property
    def weight(self) -> Tensor:
        return torch.einsum("ok...,kc...->oc...", self.up, self.down)

    @property
    def _up_is_spatial(self) -> bool:
        return tuple(self.up.shape[2:]) != (1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C_out, H', W'), or both without B."""
        if self._up_is_spatial:
            return self._convolve(functional.conv2d(x, self.down), self.up, self.bias)
        return functional.conv2d(self._convolve(x, self.down, None), self.up, self.bias)

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return functional.conv2d(x, weight, bias, self.stride, self.padding, self.dilation)

    def to_dense(self) -> nn.Conv2d:
        dense = nn.Conv2d(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            bias=self.bias is not None,
            device="meta",
        )
        return _filled(dense, product(self.up, self.down), self)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, rank={self.rank}, "
            f"stride={self.stride}, padding={self.padding}, dilation={self.dilation}, bias={self.bias is not None}, "
            f"fixed={self.fixed!r}"
        )


def _fixed(factors: tuple[str, str], side: Side, trainable: bool) -> str | None:
    return None if trainable else factors[side == "output"]


_Layer = TypeVar("_Layer", bound=Projected)


def _taking_over(module: nn.Module, projected: _Layer) -> _Layer:
    """What was frozen in the dense layer stays frozen; eval stays eval."""
    for name in projected.factors:
        if name != projected.fixed:
            projected.get_parameter(name).requires_grad_(module.get_parameter("weight").requires_grad)
    if getattr(projected, "bias", None) is not None:
        projected.get_parameter("bias").requires_grad_(module.get_parameter("bias").requires_grad)
    return projected.train(module.training)


_Dense = TypeVar("_Dense", nn.Linear, nn.Embedding, nn.Conv2d)


def _filled(dense: _Dense, weight: Tensor, projected: Projected) -> _Dense:
    """`dense`, made without memory or random numbers, gets its parameters."""
    dense.weight = nn.Parameter(weight.contiguous())
    bias = getattr(projected, "bias", None)
    if bias is not None:
        dense.bias = nn.Parameter(bias.detach().clone())
    return dense.train(projected.training)
