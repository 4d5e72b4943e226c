"""What mkdocs.yml hooks into the build: pages made from files of the repository's root, so that nothing is kept twice,
and a check that the built site loads nothing from another host."""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "security.md": "SECURITY.md",
    "changelog.md": "CHANGELOG.md",
}
SECTION = re.compile(r"^<!-- section of README\.md: (.+) -->$", re.MULTILINE)
LINK = re.compile(r"(\]\()([^)#\s]+)(#[^)\s]*)?(\))")
# Elements that a browser fetches by itself; a link is followed by its reader alone.
FETCHED = re.compile(
    r"<(?:script|img|iframe|source|audio|video|embed)\b[^>]*\bsrc=[\"']?((?:https?:)?//[^\s\"'>]+)"
    r"|<link\b(?![^>]*rel=[\"']?(?:canonical|prev|next)\b)[^>]*\bhref=[\"']?((?:https?:)?//[^\s\"'>]+)",
    re.IGNORECASE,
)
FETCHED_BY_STYLE = re.compile(r"(?:@import\s+|url\()\s*[\"']?((?:https?:)?//[^\s\"')]+)", re.IGNORECASE)


def from_root(text: str) -> str:
    """Markdown of the repository's root with its links as they are from docs/."""
    names = {source: page for page, source in PAGES.items()}

    def moved(match: re.Match[str]) -> str:
        before, target, anchor, after = match.groups()
        return f"{before}{names.get(target, target.removeprefix('docs/'))}{anchor or ''}{after}"

    return LINK.sub(moved, text)


def section(title: str, text: str) -> str:
    """What stands under a heading of the second level."""
    for part in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        heading, _, body = part.partition("\n")
        if heading == title:
            return body.strip()
    raise ValueError(f"README.md has no section {title!r}")


def with_sections(text: str, readme: str) -> str:
    return SECTION.sub(lambda match: from_root(section(match[1], readme)), text)


def fetched_from_elsewhere(folder: Path) -> list[str]:
    """Addresses on other hosts that a browser would load with a page of the built site."""
    found = []
    for file in sorted(folder.rglob("*")):
        if file.suffix in (".html", ".css", ".svg"):
            text = file.read_text(encoding="utf-8")
            hits = [*FETCHED.findall(text), *((hit, "") for hit in FETCHED_BY_STYLE.findall(text))]
            found += [f"{file.relative_to(folder)}: {one or other}" for one, other in hits]
    return found


# Called by mkdocs


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    for page, source in PAGES.items():
        text = from_root((ROOT / source).read_text(encoding="utf-8"))
        files.append(File.generated(config, page, content=text))
    return files


def to_root(text: str) -> str:
    """Markdown of docs/ with its links to files of the root, as on GitHub, to the pages that are made of them."""
    names = {source: page for page, source in PAGES.items()}

    def moved(match: re.Match[str]) -> str:
        before, target, anchor, after = match.groups()
        up, source = re.fullmatch(r"((?:\.\./)*)(.*)", target, re.DOTALL).groups()  # type: ignore[union-attr]
        if not up or source not in names:
            return match[0]
        return f"{before}{up.removeprefix('../')}{names[source]}{anchor or ''}{after}"

    return LINK.sub(moved, text)


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    return with_sections(to_root(markdown), (ROOT / "README.md").read_text(encoding="utf-8"))


def on_post_build(config: Any) -> None:
    found = fetched_from_elsewhere(Path(config["site_dir"]))
    if found:
        from mkdocs.exceptions import PluginError

        raise PluginError("the site would load from other hosts:\n" + "\n".join(found))
