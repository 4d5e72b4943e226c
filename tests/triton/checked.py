"""Triton's interpreter with checks. Needs TRITON_INTERPRET=1 before Triton is imported.

Within `checked()` a launch raises Triton's InterpreterError, caused by a CheckError, for: a lane outside every tensor
that was passed; bytes that one program stores and another loads or stores (in whatever order they run); two lanes of a
store that share a place; an atomic; arithmetic on bfloat16, which the interpreter would do on the raw bits. Programs
run in a shuffled order. Products round as a GPU's do: bfloat16 operands are taken for what they are, and those in TF32
are rounded. Missing barriers within a program, and what the hardware does, are not seen.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

BUILDER = interpreter.InterpreterBuilder
Program = tuple[int, int, int]


class CheckError(AssertionError):
    """What the interpreter alone would have let pass."""


@dataclass
class Counts:
    """What the launches moved and multiplied."""

    loaded: int = 0
    stored: int = 0
    product_flops: int = 0


@dataclass
class Memory:
    """What the programs of one launch touched."""

    spans: list[tuple[int, int]]  # of the tensors that were passed: first byte, past the last
    program: Program = (0, 0, 0)
    writer: dict[int, Program] = field(default_factory=dict)
    reader: dict[int, Program | None] = field(default_factory=dict)  # None: several programs

    def lanes(self, pointers: Any, mask: Any, what: str) -> tuple[np.ndarray, int]:
        """Addresses of the lanes that are not masked, and the bytes of an element."""
        address = np.asarray(pointers.data).astype(np.int64)
        address = address[np.broadcast_to(np.asarray(mask.data).astype(bool), address.shape)]
        size = max(pointers.get_element_ty().primitive_bitwidth // 8, 1)
        inside = np.zeros(address.shape, bool)
        for first, end in self.spans:
            inside |= (address >= first) & (address + size <= end)
        if not inside.all():
            raise CheckError(f"{what} out of bounds: {int((~inside).sum())} lanes of program {self.program}")
        return address, size

    def load(self, addresses: np.ndarray) -> None:
        for address in np.unique(addresses).tolist():
            if self.writer.get(address, self.program) != self.program:
                raise CheckError(f"race: {self.program} loads what {self.writer[address]} stored")
            self.reader[address] = self.program if self.reader.get(address, self.program) == self.program else None

    def store(self, addresses: np.ndarray) -> None:
        for address in np.unique(addresses).tolist():
            writer, reader = self.writer.get(address, self.program), self.reader.get(address, self.program)
            if writer != self.program or reader != self.program:
                raise CheckError(f"race: {self.program} stores what another program loads or stores")
            self.writer[address] = self.program


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Bits of the nearest bfloat16, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def to_tf32(values: np.ndarray) -> np.ndarray:
    """The nearest number of ten mantissa bits, ties away from zero."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)


def multiplied(a: np.ndarray, b: np.ndarray, dtype: Any, precision: str) -> np.ndarray:
    """a b as a tensor core takes its operands."""
    if dtype == tl.bfloat16:
        a, b = from_bfloat16(a), from_bfloat16(b)
    elif dtype == tl.float16:
        a, b = a.astype(np.float32), b.astype(np.float32)
    elif dtype == tl.float32 and precision == "TF32":
        a, b = to_tf32(a), to_tf32(b)
    elif dtype == tl.float32 and precision != "IEEE":
        raise CheckError(f"products of float32 with input precision {precision}: name it")
    return np.matmul(a, b)


@contextlib.contextmanager
def checked(seed: int = 0) -> Iterator[Counts]:
    """Launches in this block are checked; programs run in an order drawn with `seed`."""
    counts, memory, passed = Counts(), Memory([]), []
    order: dict[Program, np.ndarray] = {}
    names = (
        "create_masked_load", "create_masked_store", "create_atomic_rmw", "create_dot", "cast_impl", "binary_op",
        "set_grid_idx", "set_grid_dim",
    )  # fmt: skip
    stock = {name: getattr(BUILDER, name) for name in names}
    convert = interpreter._implicit_cvt

    def implicit_cvt(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            length = 1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
            passed.append(
                (value.data_ptr(), value.data_ptr() + (length * value.element_size() if value.numel() else 0))
            )
        return convert(value)

    def load(self: Any, pointers: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        addresses, size = memory.lanes(pointers, mask, "load")
        counts.loaded += addresses.size * size
        memory.load(addresses)
        return stock["create_masked_load"](self, pointers, mask, *rest, **named)

    def store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        addresses, size = memory.lanes(pointers, mask, "store")
        if np.unique(addresses).size != addresses.size:
            raise CheckError(f"lanes of program {memory.program} store to one place")
        counts.stored += addresses.size * size
        memory.store(addresses)
        return stock["create_masked_store"](self, pointers, value, mask, *rest, **named)

    def atomic(self: Any, *arguments: Any) -> Any:
        raise CheckError("an atomic: the order of its sums is not fixed")

    def dot(self: Any, a: Any, b: Any, d: Any, precision: Any, *rest: Any) -> Any:
        name = str(getattr(precision, "name", precision)).rpartition(".")[2].upper()
        counts.product_flops += 2 * d.data.size * a.data.shape[-1]
        product = multiplied(a.data, b.data, a.dtype.scalar, name)
        return interpreter.TensorHandle(product.astype(d.data.dtype) + d.data, d.dtype.scalar)

    def cast(self: Any, source: Any, target: Any) -> Any:
        if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
            return interpreter.TensorHandle(to_bfloat16(source.data), target.scalar)
        return stock["cast_impl"](self, source, target)

    def binary(self: Any, left: Any, right: Any, operation: Any) -> Any:
        if left.dtype.scalar == tl.bfloat16:
            raise CheckError("arithmetic on bfloat16: convert to float32 after the load")
        return stock["binary_op"](self, left, right, operation)

    def set_grid(self: Any, *grid: int) -> Any:
        memory.__init__(list(passed))  # type: ignore[misc]
        passed.clear()
        return stock["set_grid_dim"](self, *grid)

    def set_program(self: Any, x: int, y: int, z: int) -> Any:
        grid = tuple(self.grid_dim)
        if grid not in order:
            order[grid] = np.random.default_rng(seed).permutation(grid[0] * grid[1] * grid[2])
        program = int(order[grid][(x * grid[1] + y) * grid[2] + z])
        memory.program = (program // (grid[1] * grid[2]), program // grid[2] % grid[1], program % grid[2])
        return stock["set_grid_idx"](self, *memory.program)

    replaced = (load, store, atomic, dot, cast, binary, set_program, set_grid)
    interpreter._implicit_cvt = implicit_cvt
    for name, function in zip(names, replaced, strict=True):
        setattr(BUILDER, name, function)
    try:
        yield counts
    finally:
        interpreter._implicit_cvt = convert
        for name, function in stock.items():
            setattr(BUILDER, name, function)
