"""Compiles kernels for a GPU that is not there, from ordinary launches on tensors of the CPU.

Not with TRITON_INTERPRET. Signature, alignment and constants are those of the package's own launchers, not of a test.
"""

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Resources(NamedTuple):
    """What a compiled kernel takes."""

    registers: int
    spilled: int  # bytes of local memory of a thread, or registers on AMD
    shared: int


class _Driver:
    """Says that there is a GPU, and knows no more."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, name: str) -> str:
        return "int"


@contextlib.contextmanager
def compile_only(target: GPUTarget) -> Iterator[list[tuple[str, Any]]]:
    """Launches in this block compile and do not run; the list gets (name, compiled kernel) of each."""
    compiled: list[tuple[str, Any]] = []
    run, before = jit.JITFunction.run, driver._active
    driver.set_active(_Driver(target))

    def warm_up(self: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> Any:
        self.device_caches.clear()  # they know the device's number and not its kind
        kernel = run(self, *arguments, grid=grid, warmup=True, **named)
        compiled.append((self.__name__, kernel))
        return kernel

    jit.JITFunction.run = warm_up
    try:
        yield compiled
    finally:
        jit.JITFunction.run = run
        driver._active = before


def resources(kernel: Any) -> Resources:
    if "amdgcn" in kernel.asm:
        text = kernel.asm["amdgcn"]
        used = {name: int(re.search(rf"\.{name}:\s+(\d+)", text)[1]) for name in ("vgpr_count", "vgpr_spill_count")}
        return Resources(used["vgpr_count"], used["vgpr_spill_count"], kernel.metadata.shared)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [TOOLS / "cuobjdump", "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text).groups()
    return Resources(int(registers), int(stack) + int(local), kernel.metadata.shared)
