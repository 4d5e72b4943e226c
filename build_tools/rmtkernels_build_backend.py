"""The PEP 517 backend: setuptools' own, asking first for what an isolated build cannot see, torch.

Only the hooks that end in compiled code ask; an sdist and the metadata need neither torch nor a compiler.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from cuda_toolkit import cuda_mode
from setuptools import build_meta
from setuptools.build_meta import (
    build_editable,
    build_sdist,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)
from torch_location import find_torch

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    find_torch()
    cuda_mode()
    return build_meta.get_requires_for_build_wheel(config_settings)


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    find_torch()
    cuda_mode()
    return build_meta.get_requires_for_build_editable(config_settings)


def build_wheel(wheel_directory: Any, config_settings: Any = None, metadata_directory: Any = None) -> str:
    # setuptools packs everything it ever copied to build/lib, also modules that the source no longer has
    for stale in Path("build").glob("lib*"):
        shutil.rmtree(stale)
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)
