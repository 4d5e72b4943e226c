"""What each native module is made of: sources, flags, libraries. Paths are relative to the repository's root.

Relative paths keep the build machine's folders out of error messages, and let a copied tree reuse its objects.
"""

from __future__ import annotations

import platform
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from cuda_toolkit import CudaToolkit
from torch_location import TorchInstall

# No -march=native and no -ffast-math: the same source gives the same bits on every machine. Contraction is off because
# the kernels write their fused multiply-adds themselves.
CXX_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra"]
INCLUDES = ["-Icsrc/include", "-Icsrc"]
AVX2_FLAGS = ["-DRMT_ISA=avx2", "-mavx2", "-mfma", "-mf16c"]
# SIMD vectors without AVX are passed in memory; GCC remarks on it, but no vector crosses an object file's border
BASELINE_FLAGS = ["-DRMT_ISA=baseline", "-Wno-psabi"]
# One binary for torch 2.10 and newer, Python 3.10 and newer
STABLE_ABI_FLAGS = ["-DTORCH_TARGET_VERSION=0x020a000000000000ULL", "-DPy_LIMITED_API=0x030A0000"]
# A compiler that links the C++ library statically must not export it: half of its symbols would then resolve to torch's
# copy, and the first error message formatted with numbers would take the process down (seen with PyTorch 2.11).
LINK_FLAGS = ["-Wl,--exclude-libs,libstdc++.a"]
NVCC_FLAGS = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden,-ffp-contract=off"]


@dataclass(frozen=True)
class Compilation:
    """One object file. `rule` is the compiler, cxx or nvcc; `variant` tells two objects of one source apart."""

    source: Path
    rule: str
    flags: list[str]
    variant: str = ""


@dataclass(frozen=True)
class NativeModule:
    """One shared library of the package, such as _C."""

    name: str
    compilations: list[Compilation]
    link_flags: list[str]


def instruction_sets() -> list[str]:
    """The sets every csrc/cpu/*_kernels.cpp is compiled for, best first; the running machine picks one."""
    return ["avx2", "baseline"] if platform.machine().lower() in ("x86_64", "amd64") else ["baseline"]


def cpu_module(torch: TorchInstall) -> NativeModule:
    flags = _torch_compile_flags(torch)
    if "avx2" in instruction_sets():
        flags.append("-DRMT_HAVE_AVX2=1")
    compilations = []
    for source in _sources("csrc/cpu", "*.cpp"):
        if not source.stem.endswith("_kernels"):
            compilations.append(Compilation(source, "cxx", flags))
            continue
        for variant in instruction_sets():
            variant_flags = AVX2_FLAGS if variant == "avx2" else BASELINE_FLAGS
            compilations.append(Compilation(source, "cxx", [*flags, *variant_flags], variant))
    return NativeModule("_C", compilations, _torch_link_flags(torch))


def cuda_module(torch: TorchInstall, toolkit: CudaToolkit, jobs: int) -> NativeModule:
    kernels = cuda_kernels()
    threads = max(1, jobs // max(1, len(kernels)))  # architectures in parallel, where files alone leave cores idle
    nvcc_flags = [*NVCC_FLAGS, *INCLUDES, *toolkit.gencode(), f"--threads={threads}"]
    compilations = [Compilation(source, "nvcc", nvcc_flags) for source in kernels]
    for source in _sources("csrc/cuda", "*.cpp"):
        compilations.append(Compilation(source, "cxx", _torch_compile_flags(torch)))
    return NativeModule(
        "_C_cuda", compilations, [*_torch_link_flags(torch), str(toolkit.cudart), "-lrt", "-ldl", "-lpthread"]
    )


def cuda_kernels() -> list[Path]:
    return _sources("csrc/cuda", "*.cu")


def host_module() -> NativeModule | None:
    """The pybind11 module, when there is one. It is bound to one Python version, unlike the others."""
    sources = _sources("csrc/host", "*.cpp")
    if not sources:
        return None
    import pybind11

    include = Path(pybind11.get_include()).resolve()
    flags = [*CXX_FLAGS, *INCLUDES, f"-isystem{include}", _python_include()]
    return NativeModule("_host", [Compilation(source, "cxx", flags) for source in sources], LINK_FLAGS)


def _torch_compile_flags(torch: TorchInstall) -> list[str]:
    return [*CXX_FLAGS, *STABLE_ABI_FLAGS, *INCLUDES, f"-isystem{torch.include}", _python_include()]


def _torch_link_flags(torch: TorchInstall) -> list[str]:
    # No rpath: torch has loaded these libraries before ours is loaded. libtorch must stay among the needed ones: under
    # a CUDA torch it brings the stream function into scope that _C_cuda refers to weakly.
    return [*LINK_FLAGS, f"-L{torch.lib}", "-Wl,--no-as-needed", "-lc10", "-ltorch_cpu", "-ltorch"]


def _python_include() -> str:
    return f"-isystem{sysconfig.get_paths()['include']}"


def _sources(folder: str, pattern: str) -> list[Path]:
    return sorted(Path(folder).glob(pattern))
