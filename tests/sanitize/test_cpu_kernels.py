"""The sanitizers see nothing in the CPU kernels of four slices: no address, no race. (spectrum is compared with its
oracle in tests/unit alone.)"""

import os
import platform
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [
    "tests/sanitize/cpu_kernels_driver.cpp",
    *(f"csrc/cpu/{name}_kernels.cpp" for name in ("sliding_window", "covariance", "lanczos", "lowrank_linear")),
]
COMMON = ["-std=c++17", "-O1", "-g1", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-Icsrc/include", "-Icsrc"]
ISAS = {"baseline": ["-Wno-psabi"], "avx2": ["-mavx2", "-mfma", "-mf16c"]}
SANITIZERS = {"memory": "address,undefined", "thread": "thread"}


@pytest.mark.parametrize("sanitizer", SANITIZERS)
@pytest.mark.parametrize("isa", ISAS)
def test_sanitizers_are_silent(isa: str, sanitizer: str, tmp_path: Path) -> None:
    if isa == "avx2" and (platform.machine() != "x86_64" or "avx2" not in Path("/proc/cpuinfo").read_text()):
        pytest.skip("this processor has no AVX2")
    program = tmp_path / "driver"
    checks = [f"-fsanitize={SANITIZERS[sanitizer]}", "-fno-sanitize-recover=all"]
    command = ["g++", *COMMON, f"-DRMT_ISA={isa}", *ISAS[isa], *checks, *SOURCES, "-o", str(program), "-pthread"]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    environment = os.environ | {"TSAN_OPTIONS": "halt_on_error=1"}
    done = subprocess.run([program], env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ok\n", "")
