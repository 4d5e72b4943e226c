"""What pyproject.toml cannot say: two import roots, and native modules built by ninja."""

import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup

sys.path.insert(0, str(Path(__file__).resolve().parent / "build_tools"))

from native_command import BuildNative

SYSTEMS = find_packages("python")

setup(
    packages=[*find_packages(include=["rmtkernels", "rmtkernels.*"]), *SYSTEMS],
    package_dir={"rmtkernels": "rmtkernels", **{name: f"python/{name}" for name in SYSTEMS if "." not in name}},
    package_data={
        "rmtkernels": ["py.typed"],
        "eigentrack": ["py.typed", "detectors/*/*", "page/*"],
        "rmtkd": ["py.typed"],
    },
    include_package_data=False,
    ext_modules=[
        Extension("rmtkernels._C", sources=[], py_limited_api=True),
        Extension("rmtkernels._C_cuda", sources=[], py_limited_api=True),
        Extension("rmtkernels._host", sources=[]),
    ],
    cmdclass={"build_ext": BuildNative},
)
