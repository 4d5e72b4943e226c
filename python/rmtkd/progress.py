"""Progress bars on standard error."""

from collections.abc import Iterable
from typing import TypeVar

from rmtkd import processes

Item = TypeVar("Item")
PATIENCE = 2  # seconds before a bar is shown


def with_bar(items: Iterable[Item], what: str, progress: bool) -> Iterable[Item]:
    """The items; with a bar if `progress`, they take longer than two seconds, and no other process has one."""
    from tqdm.auto import tqdm

    bar: Iterable[Item] = tqdm(items, desc=what, delay=PATIENCE, disable=not (progress and processes.first()))
    return bar
