"""Dataclasses from JSON values that somebody else may have written: every field there, and of its type."""

from contextlib import suppress
from dataclasses import fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from rmtkd.config import Config
from rmtkd.errors import FileFormatError

Record = TypeVar("Record")


def decode(kind: type[Record], value: Any, where: str) -> Record:
    """`value`, as `dataclasses.asdict` and `json` make it of a dataclass, as that dataclass again.

    Fields whose metadata has "json": False keep their defaults.

    Args:
        kind: fields may be int, float, str, bool, None, unions of them, tuples and dicts of them, and dataclasses.
        where: what the value is, for the message.

    Raises:
        FileFormatError: if a field is missing, unknown or of another type.
        ConfigError: if settings in it are out of range.
    """
    decoded: Record = _decoded(kind, value, where)
    return decoded


def _decoded(kind: Any, value: Any, where: str) -> Any:
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Config:
        return Config.from_fields(value)
    if is_dataclass(kind):
        return _record(kind, value, where)
    if origin in (Union, UnionType):
        if value is None and NoneType in inner:
            return None
        return _any_of([option for option in inner if option is not NoneType], value, where)
    if origin is tuple and isinstance(value, list):
        if inner[-1] is Ellipsis:
            return tuple(_decoded(inner[0], item, f"{where}[{index}]") for index, item in enumerate(value))
        if len(value) == len(inner):
            return tuple(_decoded(one, item, where) for one, item in zip(inner, value, strict=True))
    if origin is dict and isinstance(value, dict):
        return {name: _decoded(inner[1], item, f"{where}.{name}") for name, item in value.items()}
    if type(value) is kind or (kind is float and type(value) is int):
        return value
    raise FileFormatError(f"{where} must be {getattr(kind, '__name__', kind)}, got {value!r:.60}")


def _any_of(kinds: list[Any], value: Any, where: str) -> Any:
    for kind in kinds[:-1]:
        with suppress(FileFormatError):
            return _decoded(kind, value, where)
    return _decoded(kinds[-1], value, where)


def _record(kind: Any, value: Any, where: str) -> Any:
    hints = get_type_hints(kind)
    names = [field.name for field in fields(kind) if field.metadata.get("json", True)]
    if not isinstance(value, dict) or set(value) != set(names):
        found = ", ".join(sorted(map(str, value))) if isinstance(value, dict) else type(value).__name__
        raise FileFormatError(f"{where} must have the fields {', '.join(names)}, got {found:.200}")
    return kind(**{name: _decoded(hints[name], value[name], f"{where}.{name}") for name in names})
