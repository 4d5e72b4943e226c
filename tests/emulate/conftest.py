"""Compiles CUDA sources with g++ and the emulation header, each program once per test session."""

import subprocess
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PLANTED = "tests/emulate/planted_bugs.cu"

COMMON = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-DRMT_EMULATE", "-pthread"]
COMMON += ["-DEMU_SHARED_MAX=101376"]  # 99 KB: the least that a shipped architecture gives a block
INCLUDES = ["-Itests/emulate", "-Icsrc/include", "-Icsrc"]
# Two layers, problems or parts in a launch: three then show what happens between launches.
SMALL_LAUNCHES = ["-DRMT_LAYERS_PER_LAUNCH=2", "-DRMT_PROBLEMS_PER_LAUNCH=2", "-DRMT_LANCZOS_PARTS=2"]
SMALL_LAUNCHES += ["-DRMT_COVARIANCE_CHUNK_ROWS=64", "-DRMT_COVARIANCE_TENSOR_CHUNK_ROWS=64"]
BUILDS = {
    "plain": ["-O0", *SMALL_LAUNCHES],
    "wavefronts of 64": ["-O0", *SMALL_LAUNCHES, "-DEMU_WARP=64"],
    "thread": ["-O1", "-g1", *SMALL_LAUNCHES, "-fsanitize=thread"],
    "address": ["-O0", "-g1", *SMALL_LAUNCHES, "-fsanitize=address"],
    "memory": ["-O0", "-g1", *SMALL_LAUNCHES, "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "library": ["-O2", "-shared", "-fPIC", "-ffp-contract=off"],
    "library with contraction": ["-O2", "-shared", "-fPIC", "-ffp-contract=fast", "-mfma"],
}


class Builder:
    """Two compilers at a time. Objects are shared between programs that use the same source and flags."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pool = ThreadPoolExecutor(2)
        self.objects: dict[tuple[str, str, Path | None], Future[Path]] = {}

    def kernels(self, build: str, slice_name: str) -> Path:
        """The kernels of a slice as a shared library."""
        return self._link([f"csrc/cuda/{slice_name}.cu"], build)

    def driver(self, build: str, slice_name: str, overlay: Path | None = None) -> Path:
        """The kernels with their C++ driver. Headers in `overlay` come before the repository's own."""
        return self._link([f"csrc/cuda/{slice_name}.cu", f"tests/emulate/{slice_name}_driver.cpp"], build, overlay)

    def planted_bugs(self, build: str) -> Path:
        return self._link([PLANTED], build)

    def start_driver(self, build: str, slice_name: str, overlay: Path) -> None:
        """Compiles in the background what driver() will want."""
        self._object(f"tests/emulate/{slice_name}_driver.cpp", build)
        self._object(f"csrc/cuda/{slice_name}.cu", build, overlay)

    def _object(self, source: str, build: str, overlay: Path | None = None) -> Future[Path]:
        key = (source, build, overlay)
        if key not in self.objects:
            output = self.folder / f"{len(self.objects)}.o"
            includes = [f"-I{overlay}", *INCLUDES] if overlay else INCLUDES
            command = ["g++", *COMMON, *BUILDS[build], *includes, "-c", "-x", "c++", source, "-o", str(output)]
            self.objects[key] = self.pool.submit(self._run, command, output)
        return self.objects[key]

    def _link(self, sources: list[str], build: str, overlay: Path | None = None) -> Path:
        pending = [self._object(source, build, overlay if source.endswith(".cu") else None) for source in sources]
        objects = [str(future.result()) for future in pending]
        output = Path(objects[0]).with_suffix(f".{len(sources)}")
        return self._run(["g++", *BUILDS[build], *objects, "-o", str(output), "-pthread"], output)

    @staticmethod
    def _run(command: list[str], output: Path) -> Path:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"
        return output


@pytest.fixture(scope="session")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Builder:
    return Builder(tmp_path_factory.mktemp("emulated"))
