"""What is built, what runs where, and why something is missing. Each part is gathered on its own: where one fails, its
error is the answer, since the report is read when something is broken."""

import json
import os
import platform
import re
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parent
LIBRARIES = {"_C": "CPU kernels", "_C_cuda": "CUDA kernels", "_host": "numerics on NumPy arrays"}


def collect() -> dict[str, Any]:
    """The report as plain data, ready for JSON."""
    build = _build_info()
    return {
        "folder": str(PACKAGE),
        "versions": _versions(),
        "build": build,
        "libraries": _or_error(_libraries),
        "cpu": _or_error(_cpu),
        "cuda": _or_error(lambda: _cuda(build)),
        "operators": _or_error(_operators),
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith("RMTKERNELS_")},
    }


def render(report: dict[str, Any]) -> str:
    """The report for a person."""
    versions = [f"{name} {version}" for name, version in report["versions"].items()]
    lines = [f"{versions[0]} in {report['folder']}", f"  {', '.join(versions[1:])}"]
    lines += ["", "Build", *_render_build(report["build"])]
    lines += ["", "Libraries", *_render_libraries(report["libraries"], report["build"])]
    lines += ["", "CPU", *_render_mapping(report["cpu"]), "", "CUDA", *_render_mapping(report["cuda"])]
    lines += ["", "Operators", *_render_operators(report["operators"])]
    lines += ["", "Environment variables", *_render_mapping(report["environment"] or "no RMTKERNELS_* variable is set")]
    return "\n".join(lines)


def to_json(report: dict[str, Any]) -> str:
    return json.dumps(report, indent=2)


def _or_error(ask: Callable[[], Any]) -> Any:
    try:
        return ask()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _versions() -> dict[str, str]:
    names = ("rmtkernels", "torch", "numpy", "scipy")
    return {
        **{name: _version(name) for name in names},
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "(not installed)"


def _build_info() -> dict[str, Any]:
    """What build_tools/build_record.py wrote; empty if this folder was never built."""
    try:
        info: dict[str, Any] = json.loads((PACKAGE / "_build_info.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return info


def _libraries() -> dict[str, str]:
    from rmtkernels import _native

    return dict(_native.STATUS)


def _cpu() -> dict[str, Any]:
    from rmtkernels import dispatch

    return {"instruction set in use": dispatch.cpu_isa(), "available here": list(dispatch.cpu_isas())}


def _cuda(build: dict[str, Any]) -> dict[str, Any]:
    import torch

    built = build.get("cuda", {})
    architectures = built.get("architectures", [])
    devices = []
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        covered = "covered" if _covers(architectures, major, minor) else "NOT covered: add it to TORCH_CUDA_ARCH_LIST"
        devices.append(f"{torch.cuda.get_device_name(index)} ({major}.{minor}, {covered} by this build)")
    return {
        "built": built.get("status", "unknown"),
        "reason": built.get("reason", ""),
        "nvcc": built.get("nvcc", ""),
        "architectures": architectures,
        "torch built for CUDA": torch.version.cuda or "none",
        "devices torch sees": devices,
    }


def _covers(architectures: list[str], major: int, minor: int) -> bool:
    """Whether code for these architectures, "8.0" or "80", runs on a device of capability major.minor.

    A binary runs on its minor version and later ones of the same major version, PTX on everything later as well. Both
    run on their exact version alone if architecture-specific ("9.0a"), and on no other major one if family-specific
    ("10.0f"). Names that are none of these cover nothing.
    """
    for architecture in architectures:
        match = re.fullmatch(r"(\d+?)\.?(\d)([af]?)(\+PTX)?", architecture)
        if match is None:
            continue
        built, kind, ptx = (int(match[1]), int(match[2])), match[3], match[4]
        if built == (major, minor):
            return True
        if kind != "a" and built < (major, minor) and (built[0] == major or (ptx and not kind)):
            return True
    return False


def _operators() -> dict[str, dict[str, str]]:
    from rmtkernels import dispatch

    return {operator: dispatch.backends(operator) for operator in dispatch.OPERATORS}


def _render_build(build: dict[str, Any]) -> list[str]:
    if not build:
        return ["  never built here: in the source folder type `pip install -e .`; if it is installed, start elsewhere"]
    sets = ", ".join(build["instruction_sets"])
    return [
        f"  {build['compiler']}, torch {build['torch']}, python {build['python']}, {build['machine']}",
        f"  instruction sets: {sets}",
    ]


def _render_libraries(libraries: dict[str, str] | str, build: dict[str, Any]) -> list[str]:
    if isinstance(libraries, str):
        return [f"  {libraries}"]
    lines = []
    for name, status in libraries.items():
        if name == "_C_cuda" and status == "not built" and build.get("cuda", {}).get("reason"):
            status = f"not built: {build['cuda']['reason']}"
        lines.append(f"  {name:<8} {LIBRARIES.get(name, ''):<25} {status}")
    return lines


def _render_mapping(content: dict[str, Any] | str) -> list[str]:
    if isinstance(content, str):
        return [f"  {content}"]
    width = max(map(len, content))
    lines = []
    for name, value in content.items():
        text = ", ".join(value) if isinstance(value, list) else str(value)
        if text or isinstance(value, list):
            lines.append(f"  {name:<{width}}  {text or 'none'}")
    return lines


def _render_operators(operators: dict[str, dict[str, str]] | str) -> list[str]:
    """A table of backends; what is not available carries the number of its reason."""
    if isinstance(operators, str):
        return [f"  {operators}"]
    reasons: list[str] = []
    columns = list(next(iter(operators.values())))
    width = max(map(len, operators))
    lines = [f"  {'':<{width}}  " + "  ".join(f"{column:<9}" for column in columns)]
    for operator, backends in operators.items():
        cells = []
        for column in columns:
            status = backends[column]
            if status != "available" and status not in reasons:
                reasons.append(status)
            cells.append("yes" if status == "available" else f"no ({reasons.index(status) + 1})")
        lines.append(f"  {operator:<{width}}  " + "  ".join(f"{cell:<9}" for cell in cells))
    return [line.rstrip() for line in lines] + [f"  ({number}) {reason}" for number, reason in enumerate(reasons, 1)]
