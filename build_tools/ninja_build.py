"""Writes build.ninja and runs it: compiles in parallel, and again only what a changed file or flag touches."""

from __future__ import annotations

import importlib.util
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from native_modules import Compilation, NativeModule


class NinjaBuild:
    """A build folder with its build.ninja. Everything runs from the repository's root."""

    def __init__(self, folder: Path, cxx: list[str]) -> None:
        self.folder = folder
        self.cxx = cxx

    def library(self, module: NativeModule) -> Path:
        return self.folder / f"{module.name}.so"

    def write(self, modules: Sequence[NativeModule], nvcc: Path | None) -> None:
        from ninja import Writer

        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "build.ninja").open("w", encoding="utf-8") as file:
            ninja = Writer(file, width=120)
            ninja.variable("builddir", str(self.folder))
            for name, compiler in (("cxx", self.cxx), ("nvcc", [str(nvcc)])):
                # -MD names system headers too: torch's are among them, and another torch must rebuild
                command = f"{_shell(compiler)} $flags -MD -MF $out.d -c $in -o $out"
                ninja.rule(name, command, depfile="$out.d", deps="gcc", description=f"{name} $out")
            ninja.rule("link", f"{_shell(self.cxx)} -shared -o $out $in $flags", description="link $out")
            for module in modules:
                objects = []
                for compilation in module.compilations:
                    objects.append(str(self._object(compilation)))
                    ninja.build(
                        objects[-1],
                        compilation.rule,
                        str(compilation.source),
                        variables={"flags": _shell(compilation.flags)},
                    )
                library = str(self.library(module))
                ninja.build(library, "link", objects, variables={"flags": _shell(module.link_flags)})

    def run(self, modules: Sequence[NativeModule], jobs: int) -> str:
        """Builds these modules and returns what the tools printed; raises CalledProcessError with it as output."""
        targets = [str(self.library(module)) for module in modules]
        command = [_ninja(), "-f", str(self.folder / "build.ninja"), f"-j{jobs}", *targets]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            assert process.stdout is not None
            output = []
            for line in process.stdout:
                print(line, end="", flush=True)
                output.append(line)
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command, "".join(output))
        return "".join(output)

    def _object(self, compilation: Compilation) -> Path:
        variant = f".{compilation.variant}" if compilation.variant else ""
        return self.folder / f"{compilation.source}{variant}.o"


def require_ninja_and_pybind11() -> None:
    """Without build isolation nobody installs the build requirements: say so before something fails."""
    missing = [name for name in ("ninja", "pybind11") if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"rmtkernels is built with packages that are not installed: pip install {' '.join(missing)}")


def _ninja() -> str:
    """The program of the ninja package; its folder is on PATH only in an isolated build or an activated environment."""
    from ninja import BIN_DIR

    return f"{BIN_DIR}/ninja" if BIN_DIR else "ninja"


def _shell(words: Sequence[str]) -> str:
    return shlex.join(words).replace("$", "$$")
