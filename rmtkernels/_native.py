"""Loads the compiled libraries once and remembers how that went. Loading never raises: using an absent kernel does."""

import importlib
import os
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType

MODULES = ("_C", "_C_cuda", "_host")

# Module name -> "loaded", "not built" or "failed: <what the loader said>".
STATUS: dict[str, str] = {}
_LOADED: dict[str, ModuleType] = {}
isa_error = ""  # what is wrong with RMTKERNELS_ISA; a choice made by hand never falls back


def load() -> None:
    """Imports the libraries; torch and the schemas must be there first."""
    global isa_error
    for name in MODULES:
        # Only beside this file: an editable install would lend a copied folder the libraries of the original.
        if PathFinder.find_spec(f"rmtkernels.{name}", [str(Path(__file__).parent)]) is None:
            STATUS[name] = "not built"
            continue
        try:
            _LOADED[name] = importlib.import_module(f"rmtkernels.{name}")
            STATUS[name] = "loaded"
        except Exception as error:  # a broken library must not take the report down with it
            STATUS[name] = f"failed: {error}"
    wanted = os.environ.get("RMTKERNELS_ISA") or "auto"
    if STATUS["_C"] == "loaded" and wanted != "auto" and wanted not in cpu_isas():
        isa_error = f"RMTKERNELS_ISA={wanted} is not one of auto, {', '.join(cpu_isas())}"


def cpu_isa() -> str:
    """Instruction set the CPU kernels use: "avx2" or "baseline"; "none" without CPU kernels."""
    return str(_LOADED["_C"].cpu_isa()) if "_C" in _LOADED else "none"


def cpu_isas() -> tuple[str, ...]:
    """Instruction sets that were built and that this processor has, best first."""
    return tuple(_LOADED["_C"].cpu_isas()) if "_C" in _LOADED else ()


def set_cpu_isa(name: str) -> bool:
    """False if there is no such instruction set here; then nothing changes."""
    global isa_error
    done = "_C" in _LOADED and bool(_LOADED["_C"].set_cpu_isa(name))
    isa_error = "" if done else isa_error
    return done
