"""The build_ext command of setup.py: finds torch, compilers and nvcc, has ninja build, and records what came of it."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from build_record import FILE_NAME, BuildRecord, CudaRecord
from cuda_toolkit import CudaToolkit, NoCudaError, cuda_mode, find_toolkit
from native_modules import NativeModule, cpu_module, cuda_kernels, cuda_module, host_module, instruction_sets
from ninja_build import NinjaBuild, require_ninja_and_pybind11
from setuptools.command.build_ext import build_ext
from torch_location import TorchInstall, find_torch


class BuildNative(build_ext):
    """Builds the native modules of the package; a module that is not built is not left over from an earlier build."""

    def build_extensions(self) -> None:
        torch = find_torch()
        require_ninja_and_pybind11()
        jobs = _jobs()
        cxx, compiler = _compiler()
        ninja = NinjaBuild(Path("build", "native", str(sys.implementation.cache_tag)), cxx)
        modules = [module for module in (cpu_module(torch), host_module()) if module]
        toolkit, cuda = _plan_cuda(torch)
        cuda_modules = [cuda_module(torch, toolkit, jobs)] if toolkit else []
        ninja.write([*modules, *cuda_modules], toolkit.nvcc if toolkit else None)
        _compile(ninja, modules, jobs)
        if cuda_modules:
            try:
                ninja.run(cuda_modules, jobs)
                modules += cuda_modules
            except subprocess.CalledProcessError as error:
                cuda = _stop_or_record(NoCudaError("failed", _first_error(error.output)))
        self._install(modules, ninja)
        names = [module.name for module in modules]
        record = BuildRecord(
            str(self.distribution.get_version()), compiler, torch.version, instruction_sets(), cuda, names
        )
        record.write(Path(self.build_lib, "rmtkernels"))
        record.tell()

    def _install(self, modules: list[NativeModule], ninja: NinjaBuild) -> None:
        """Copies what was built to build_lib, and forgets the extensions that were not."""
        built = {f"rmtkernels.{module.name}": module for module in modules}
        for extension in self.extensions:
            target = Path(self.get_ext_fullpath(extension.name))
            target.unlink(missing_ok=True)
            if extension.name in built:
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ninja.library(built[extension.name]), target)
        self.extensions = [extension for extension in self.extensions if extension.name in built]

    def copy_extensions_to_source(self) -> None:
        """For an editable install."""
        package = Path("rmtkernels")
        for stale in package.glob("_*.so"):
            stale.unlink()
        super().copy_extensions_to_source()
        shutil.copy2(Path(self.build_lib, "rmtkernels", FILE_NAME), package / FILE_NAME)


def _plan_cuda(torch: TorchInstall) -> tuple[CudaToolkit | None, CudaRecord]:
    if cuda_mode() == "off":
        return None, CudaRecord("off", "RMTKERNELS_CUDA=off")
    try:
        if not cuda_kernels():
            raise NoCudaError("off", "csrc/cuda has no kernels")
        toolkit = find_toolkit(site_packages=torch.root.parent)
    except NoCudaError as error:
        return None, _stop_or_record(error)
    return toolkit, CudaRecord("on", nvcc=toolkit.version, architectures=toolkit.architectures)


def _compile(ninja: NinjaBuild, modules: list[NativeModule], jobs: int) -> None:
    try:
        ninja.run(modules, jobs)
    except subprocess.CalledProcessError:
        sys.exit("rmtkernels: compiling failed, the first error above says why")


def _stop_or_record(error: NoCudaError) -> CudaRecord:
    if cuda_mode() == "on":
        sys.exit(f"rmtkernels: RMTKERNELS_CUDA=on, but {error.reason}")
    return CudaRecord(error.status, error.reason)


def _first_error(output: str) -> str:
    """The line a person would look for in a compiler's output."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line.lower()), lines[-1] if lines else "ninja failed")


def _jobs() -> int:
    value = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    if not value.isdigit() or int(value) < 1:
        sys.exit(f"MAX_JOBS={value} is no positive number")
    return int(value)


def _compiler() -> tuple[list[str], str]:
    """The C++ compiler's command, which CXX may set ("ccache g++"), and the first line of its --version."""
    cxx = shlex.split(os.environ.get("CXX") or "g++")
    if shutil.which(cxx[0]) is None:
        sys.exit(f"rmtkernels needs a C++17 compiler and finds no {cxx[0]}: install g++, or set CXX to another")
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        sys.exit("rmtkernels needs Python's header files: install them (Debian and Ubuntu: apt install python3-dev)")
    answer = subprocess.run([*cxx, "--version"], capture_output=True, text=True, check=True)
    return cxx, answer.stdout.splitlines()[0]
