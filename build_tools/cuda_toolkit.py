"""Whether and with which nvcc the CUDA module is built. A visible GPU plays no part: images are built without one."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

DEFAULT_ARCHITECTURES = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
# PyTorch's names in TORCH_CUDA_ARCH_LIST, with its architectures, but for Blackwell's 10.3 and 12.1 (PyTorch 2.13):
# not every nvcc knows them, and binaries for 10.0 and 12.0 run there.
TORCH_NAMES = {
    "Turing": "7.5+PTX",
    "Ampere": "8.0;8.6+PTX",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell": "10.0;12.0+PTX",
}


class NoCudaError(Exception):
    """Why there will be no CUDA module: `status` is "off" (nothing to build with) or "failed" (it was tried)."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


@dataclass(frozen=True)
class CudaToolkit:
    """An nvcc that runs, its static runtime library, and the architectures to build for, such as "8.0", "12.0+PTX"."""

    nvcc: Path
    version: str
    cudart: Path
    architectures: tuple[str, ...]

    def gencode(self) -> list[str]:
        flags = []
        for architecture in self.architectures:
            number = _number(architecture)
            flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
            if architecture.endswith("+PTX"):
                flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
        return flags


def cuda_mode() -> str:
    """RMTKERNELS_CUDA: auto (build when nvcc is there; a failure leaves the CPU package), on (or stop), off."""
    mode = os.environ.get("RMTKERNELS_CUDA") or "auto"
    if mode not in ("auto", "on", "off"):
        sys.exit(f"RMTKERNELS_CUDA={mode} is not known: use auto, on or off")
    return mode


def find_toolkit(site_packages: Path) -> CudaToolkit:
    """The toolkit of CUDA_HOME, else of the nvcc on PATH, else of a pip package beside torch; raises NoCudaError."""
    nvcc, home = _find_nvcc(site_packages)
    match = re.search(r"\bV(\d+\.\d+\.\d+)", _ask(nvcc, "--version"))
    if match is None:
        raise NoCudaError("failed", f"{nvcc} --version names no version")
    folders = (home / "lib64", home / "lib", *home.glob("targets/*/lib"))
    cudart = next((path for folder in folders if (path := folder / "libcudart_static.a").exists()), None)
    if cudart is None:
        raise NoCudaError("failed", f"the toolkit {home} has no libcudart_static.a")
    return CudaToolkit(nvcc, match.group(1), cudart, _architectures(nvcc))


def _find_nvcc(site_packages: Path) -> tuple[Path, Path]:
    """nvcc and its toolkit's folder, which is not the parent of a wrapper script on PATH."""
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if named:
        if not (Path(named) / "bin" / "nvcc").exists():
            raise NoCudaError("off", f"there is no bin/nvcc in CUDA_HOME={named}")
        return Path(named) / "bin" / "nvcc", Path(named)
    on_path = shutil.which("nvcc")
    if on_path:
        nvcc = Path(on_path)
        match = re.search(r"^#\$ TOP=(.*)$", _ask(nvcc, "--dryrun", "-x", "cu", "-c", os.devnull), re.MULTILINE)
        return nvcc, Path(match.group(1)) if match else nvcc.resolve().parent.parent
    for home in (*sorted(site_packages.glob("nvidia/cu[0-9]*"), reverse=True), Path("/usr/local/cuda")):
        if (home / "bin" / "nvcc").exists():
            return home / "bin" / "nvcc", home
    raise NoCudaError("off", "no nvcc was found (set CUDA_HOME, or put nvcc on PATH)")


def _architectures(nvcc: Path) -> tuple[str, ...]:
    """TORCH_CUDA_ARCH_LIST or our own list, less what this nvcc cannot build for.

    With RMTKERNELS_CUDA=on nothing of TORCH_CUDA_ARCH_LIST is left out: what cannot be built raises NoCudaError.
    """
    known = set(_ask(nvcc, "--list-gpu-arch").split())
    named = _split(os.environ.get("TORCH_CUDA_ARCH_LIST", ""))
    asked = named or DEFAULT_ARCHITECTURES
    possible = tuple(name for name in asked if f"compute_{_number(name).rstrip('af')}" in known)
    left_out = ", ".join(name for name in asked if name not in possible)
    if not possible:
        raise NoCudaError("failed", f"{nvcc} knows none of the architectures {left_out} (TORCH_CUDA_ARCH_LIST)")
    if left_out and named and cuda_mode() == "on":
        raise NoCudaError("failed", f"{nvcc} does not know {left_out} of TORCH_CUDA_ARCH_LIST")
    if left_out:
        print(f"rmtkernels: left out, as {nvcc} does not know them: {left_out}", file=sys.stderr)
    return possible if named else (*possible[:-1], f"{possible[-1]}+PTX")


def _split(text: str) -> tuple[str, ...]:
    """The architectures of a list such as "Ampere;sm_90a 12.0+PTX", as "8.0" and each once, with PTX if any has it."""
    parts = re.split(r"[;,\s]+", text)
    names = [name for part in parts for name in TORCH_NAMES.get(part, part).split(";") if name]
    found: dict[str, str] = {}
    for name in names:
        match = re.fullmatch(r"(?:sm_|compute_)?(\d+?)\.?(\d[af]?)(\+PTX)?", name)
        architecture, ptx = (f"{match[1]}.{match[2]}", match[3] or "") if match else (name, "")
        found[architecture] = found.get(architecture) or ptx
    return tuple(architecture + ptx for architecture, ptx in found.items())


def _number(architecture: str) -> str:
    return architecture.removesuffix("+PTX").replace(".", "")


def _ask(nvcc: Path, *arguments: str) -> str:
    """What nvcc prints, on either stream."""
    try:
        answer = subprocess.run([str(nvcc), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        output = getattr(error, "stderr", "").strip() or str(error)
        raise NoCudaError("failed", f"{nvcc} {arguments[0]} fails: {output.splitlines()[-1]}") from error
    return answer.stdout + answer.stderr
