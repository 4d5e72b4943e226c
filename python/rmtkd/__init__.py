"""RMT-KD: a smaller dense model from the eigenvalues of its activations that stand out of the noise."""

from typing import TYPE_CHECKING, Any

from rmtkd.calibration import calibrate
from rmtkd.compression import compress
from rmtkd.config import Config
from rmtkd.errors import (
    CalibrationError,
    ConfigError,
    FileFormatError,
    ModelError,
    PlanError,
    ResumeError,
    RmtkdError,
    TrainingError,
)
from rmtkd.files import load, save
from rmtkd.modules import ProjectedConv2d, ProjectedEmbedding, ProjectedLinear
from rmtkd.planning import plan
from rmtkd.plans import LayerPlan, Plan

if TYPE_CHECKING:
    from rmtkd.checkpoints import Stage
    from rmtkd.distillation import distill
    from rmtkd.stages import Result, run

__all__ = [
    "CalibrationError",
    "Config",
    "ConfigError",
    "FileFormatError",
    "LayerPlan",
    "ModelError",
    "Plan",
    "PlanError",
    "ProjectedConv2d",
    "ProjectedEmbedding",
    "ProjectedLinear",
    "Result",
    "ResumeError",
    "RmtkdError",
    "Stage",
    "TrainingError",
    "calibrate",
    "compress",
    "distill",
    "load",
    "plan",
    "run",
    "save",
]

_LATER = {"distill": "distillation", "run": "stages", "Result": "stages", "Stage": "checkpoints"}


def __getattr__(name: str) -> Any:
    """What trains is imported when it is used: transformers' Trainer takes seconds to import."""
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"rmtkd.{_LATER[name]}"), name)


def __dir__() -> list[str]:
    return __all__
