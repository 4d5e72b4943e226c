"""Files of results: whole or not at all, and JSON that any reader takes."""

import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any


def write_json(file: Path, result: Any) -> None:
    """What is not a finite number, such as a share of nothing, becomes null: JSON has no word for it."""
    write_whole(file, json.dumps(_finite(result), indent=1, allow_nan=False) + "\n")


def write_whole(file: Path, text: str) -> None:
    """Written aside and renamed: the file is never half there."""
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor, aside = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}-")
    with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
        stream.write(text)
    Path(aside).chmod(0o644)
    Path(aside).replace(file)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
