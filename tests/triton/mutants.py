"""The kernels of a slice with one place broken, which the checks must find."""

import importlib.util
import os
from pathlib import Path
from types import ModuleType

PROVE = os.environ.get("RMTKERNELS_PROVE") == "1"
KERNELS = Path(__file__).resolve().parents[2] / "rmtkernels" / "triton"


def mutant(folder: Path, slice_name: str, shipped: str, broken: str) -> ModuleType:
    """The module of a slice, `shipped` replaced by `broken`. A file of its own: Triton reads the source."""
    source = (KERNELS / f"{slice_name}.py").read_text()
    assert source.count(shipped) == 1, (
        f"{slice_name}.py has changed: {shipped!r} is there {source.count(shipped)} times"
    )
    file = folder / f"{slice_name}_mutant.py"
    file.write_text(source.replace(shipped, broken))
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def chosen(mutants: dict[str, tuple[str, str, str]]) -> list[str]:
    """Names of (text as shipped, text broken, what finds it): one for each finding, all with RMTKERNELS_PROVE=1."""
    first = {finding: name for name, (_, _, finding) in reversed(mutants.items())}
    return list(mutants if PROVE else first.values())
