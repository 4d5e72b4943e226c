"""Versions of what a result depends on, without a path of this machine."""

import platform
import re
import shutil
import subprocess
from importlib import metadata


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("torch", "triton", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    for compiler, pattern in (("g++", r"\b(\d+\.\d+\.\d+)\b"), ("nvcc", r"\bV([\d.]+)")):
        if shutil.which(compiler):
            said = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
            match = re.search(pattern, said)
            found[compiler] = match[1] if match else "unknown"
    return found
