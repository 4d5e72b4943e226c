"""The code blocks of the documentation: which there are, and running a page's Python from top to bottom."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# <!-- not run: why --> on the line before a block takes it out; test_documented_code.py lists all of these.
BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<reason>[^\n]+) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True)
class Block:
    page: str  # from the root of the repository
    line: int  # of its first line of code
    language: str
    code: str
    not_run: str | None


def pages() -> list[str]:
    written = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))
    return ["README.md", "CONTRIBUTING.md", "SECURITY.md", *written]


def blocks(page: str) -> list[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    found = [
        Block(page, text.count("\n", 0, match.start("code")) + 1, match["language"], match["code"], match["reason"])
        for match in BLOCK.finditer(text)
    ]
    assert 2 * len(found) == len(re.findall(r"^ *```", text, re.MULTILINE)), f"{page}: a fence that no block is made of"
    return found


def run_python(page: str, names: dict[str, Any]) -> int:
    """Runs the page's Python blocks in their order, in one namespace; returns how many. Errors name page and line."""
    count = 0
    for block in blocks(page):
        if block.language == "python" and block.not_run is None:
            exec(compile("\n" * (block.line - 1) + block.code, page, "exec"), names)
            count += 1
    return count
