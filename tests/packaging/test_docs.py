"""The documentation: its pages, what they name, their pictures, and what builds the site, which `make docs` does."""

import ast
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from rmtkernels.dispatch import OPERATORS
from tools import slices
from tools.docs_pages import PAGES, fetched_from_elsewhere, from_root, section, with_sections
from tools.pictures import kernels

OURS = re.compile(
    r"`((?:bench|build_tools|csrc|docs|examples|python|requirements|rmtkernels|tests|tools)/[\w./-]*\w)`"
    r"|`([\w-]+\.(?:md|toml|json|yml))`"
)
# Written by a command or by the user, or a name in somebody's folder.
NOT_OURS = {"config.json", "plan.json", "rmtkd.json"}


def pages(root: Path) -> list[Path]:
    return sorted((root / "docs").rglob("*.md"))


def test_every_page_is_in_the_navigation_and_no_other(root: Path) -> None:
    navigation = re.findall(r"([\w/-]+\.md)$", (root / "mkdocs.yml").read_text(), re.MULTILINE)
    written = {page.relative_to(root / "docs").as_posix() for page in pages(root)}
    assert len(navigation) == len(set(navigation))
    assert set(navigation) == written | PAGES.keys()
    assert all((root / source).is_file() for source in PAGES.values())


def test_files_that_are_named_are_there(root: Path) -> None:
    named = 0
    for page in [*pages(root), root / "README.md", root / "SECURITY.md"]:
        for path, file in OURS.findall(page.read_text()):
            named += 1
            if file in NOT_OURS:
                continue
            assert (root / (path or file)).exists() or (page.parent / file).is_file(), f"{page} names {path or file}"
    assert named > 60


def test_the_walk_through_names_every_file_of_the_slice(root: Path) -> None:
    """docs/add-an-operator.md takes lowrank_linear as its example: no file of it may be left out."""
    page = (root / "docs/add-an-operator.md").read_text()
    owned = {
        path.relative_to(root).as_posix()
        for folder in ("csrc", "rmtkernels", "tests", "bench/cases")
        for path in (root / folder).rglob("*")
        if re.fullmatch(r"(test_)?lowrank_linear(_(kernels|driver|contract|emulated|proof))?", path.stem)
        and path.suffix in slices.SUFFIXES
    }
    assert len(owned) > 12
    assert {path for path, _ in OURS.findall(page)} >= owned


def test_every_operator_and_public_name_is_documented(root: Path) -> None:
    explained = "".join(page.read_text() for page in (root / "docs/kernels").glob("*.md"))
    assert [name for name in OPERATORS if f"`{name}`" not in explained] == []
    assert {page.stem for page in (root / "docs/kernels").glob("*.md")} == {"index", *slices.slices(root)}
    listed = re.findall(r"^::: ([\w.]+)$", (root / "docs/api.md").read_text(), re.MULTILINE)
    documented = {name.rpartition(".")[2] for name in listed}
    for package, folder in (("rmtkernels", root), ("eigentrack", root / "python"), ("rmtkd", root / "python")):
        assert f"{package}.errors" in listed
        errors = set(re.findall(r"^class (\w+)\(", (folder / package / "errors.py").read_text(), re.MULTILINE))
        public = ast.literal_eval(
            (folder / package / "__init__.py").read_text().split("__all__ = ")[1].split("]")[0] + "]"
        )
        # conventions.md lists the descriptors
        assert set(public) - documented - errors - {"DESCRIPTORS"} == set(), f"docs/api.md lacks names of {package}"


def _texts(picture: Path) -> list[str]:
    return [text for element in ElementTree.parse(picture).iter() if (text := (element.text or "").strip())]


@pytest.mark.parametrize("picture", kernels.ALL, ids=lambda picture: picture.__name__)
def test_a_committed_picture_is_what_its_function_draws(root: Path, tmp_path: Path, picture: object) -> None:
    name = f"kernel-{picture.__name__}.svg"  # type: ignore[attr-defined]
    picture(tmp_path)  # type: ignore[operator]
    committed = root / "docs/figures" / name
    assert _texts(tmp_path / name) == _texts(committed) and len(_texts(committed)) > 5
    assert (tmp_path / name).read_text().count("<path") == committed.read_text().count("<path")
    assert f"figures/{name})" in (root / f"docs/kernels/{picture.__name__}.md").read_text()  # type: ignore[attr-defined]


# What builds the site


def test_links_of_the_root_are_moved() -> None:
    text = "[a](docs/x.md#y) [b](CONTRIBUTING.md) [c](https://example.org/docs/z) ![d](docs/figures/e.svg) [f](#g)"
    assert from_root(text) == (
        "[a](x.md#y) [b](contributing.md) [c](https://example.org/docs/z) ![d](figures/e.svg) [f](#g)"
    )


def test_a_section_of_the_readme_is_taken_whole() -> None:
    readme = "# T\n\n## One\n\n[a](docs/a.md)\n\n### In one\n\n## Two\n\nb\n"
    assert section("One", readme) == "[a](docs/a.md)\n\n### In one"
    assert with_sections("x\n<!-- section of README.md: One -->\ny", readme) == "x\n[a](a.md)\n\n### In one\ny"
    with pytest.raises(ValueError, match="no section 'Three'"):
        section("Three", readme)


def test_the_gpu_page_takes_a_section_that_there_is(root: Path) -> None:
    made = with_sections((root / "docs/gpu-status.md").read_text(), (root / "README.md").read_text())
    assert "| `spectrum_eigvalsh` |" in made and "<!-- section of" not in made


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("a.html", '<script src="https://cdn.example/x.js"></script>', ["a.html: https://cdn.example/x.js"]),
        ("a.html", '<link rel="stylesheet" href="//fonts.example/f.css">', ["a.html: //fonts.example/f.css"]),
        ("a.html", '<img alt="x" src=https://img.example/y.png>', ["a.html: https://img.example/y.png"]),
        ("a.css", "@import 'https://css.example/z.css';", ["a.css: https://css.example/z.css"]),
        ("a.css", "b{src:url(https://css.example/f.woff2)}", ["a.css: https://css.example/f.woff2"]),
        ("a.html", '<a href="https://example.org">x</a><img src="b.png"><script src="assets/c.js"></script>', []),
        ("a.html", '<link rel="canonical" href="https://example.org/">', []),
    ],
)
def test_what_a_page_would_fetch_from_elsewhere_is_found(
    tmp_path: Path, name: str, text: str, found: list[str]
) -> None:
    (tmp_path / name).write_text(text)
    assert fetched_from_elsewhere(tmp_path) == found
