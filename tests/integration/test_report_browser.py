"""The report as a person meets it: in a headless Chromium, skipped where there is none."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from eigentrack.report import runs_of, write_report
from rmtkernels import DESCRIPTORS
from tests.integration.browser import CHROMIUM, DRIVER, Browser, browser
from tests.integration.recordings import Vocabulary, recording
from tests.integration.test_report import HOSTILE

pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver on the path")
WORDS = ["In", " the", " year", " 1987", ",", "\n", " nobody", " went", " to", " the", " moon", "."]
# Lightness of what is painted for a CSS colour, on top of the page's own paper.
CONTRAST = """
const context = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
const luminance = colours => {
  for (const colour of colours) { context.fillStyle = colour; context.fillRect(0, 0, 1, 1); }
  const [r, g, b] = [...context.getImageData(0, 0, 1, 1).data].map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const texts = "h1, h2, p, label, select, th, td, caption, figcaption, footer, text, #answer > span, .sample, .strip *";
return [...document.querySelectorAll(texts)]
  .filter(node => node.textContent.trim() && node.getClientRects().length).map(node => {
    const behind = [];
    for (let n = node; n; n = n.parentElement) behind.unshift(getComputedStyle(n).backgroundColor);
    const style = getComputedStyle(node);
    const ink = luminance([...behind, node.closest("svg") ? style.fill : style.color]), paper = luminance(behind);
    const ratio = (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
    return [ratio, node.tagName + " " + node.textContent.slice(0, 30)];
  });
"""


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture
def show(window: Browser, tmp_path: Path) -> Any:
    """Opens the page of a recording."""

    def opened(made: Any, texts: list[str], prompt: str = "Why?", threshold: float | None = 0.9) -> Browser:
        path = tmp_path / "run.html"
        threshold = None if made.risk is None else threshold
        write_report(path, runs_of(made, Vocabulary(texts), [prompt] * len(made.tokens), threshold))
        window.look(1200, 900, "light")
        window.complaints()
        window.open(path.as_uri())
        window.wait(f"document.querySelectorAll('#answer > span').length === {made.steps} && {SETTLED}")
        return window

    return opened


SETTLED = "document.querySelectorAll('.strip').length"


def test_hostile_texts_are_shown_and_do_nothing(show: Any) -> None:
    window = show(recording(len(HOSTILE)), HOSTILE, "".join(HOSTILE))
    for index in range(len(HOSTILE)):
        window.hover(f"#t{index}")
    assert window.run("return window.owned ?? null") is None
    assert window.complaints() == [], "the page's policy had something to block, or a script failed"
    assert window.run("return performance.getEntriesByType('resource').map(entry => entry.name)") == []
    tags = "return [...document.querySelectorAll(arguments[0])].map(node => node.tagName + '.' + node.className)"
    inside = window.run(tags, "#answer > span *, #prompt *")
    assert inside and set(inside) == {"SPAN.control"}, "a text has become an element"
    texts = window.run("return [...document.querySelectorAll('#answer > span')].map(node => node.textContent)")
    for seen, text in zip(texts, HOSTILE, strict=True):
        controls = {c for c in text if ord(c) in {0, 0x1B, 0x7F, 0x200F, 0x202E, 0x2028, 0x2066, 0xD800}}
        for control in controls:
            text = text.replace(control, f"U+{ord(control):04X}")
        assert seen == text.replace("\n", "↵\n")
    assert "onerror" in window.run("return document.getElementById('t4').getAttribute('aria-label')")


def test_ten_thousand_tokens(show: Any) -> None:
    steps = 10_000
    window = show(recording(steps, layers=2), [f" {i}" for i in range(steps)])
    window.run("document.getElementById('answer').focus()")
    window.press("End")
    assert window.run("return document.getElementById('token').textContent").startswith(" 9999 · step 9999 · risk ")
    assert window.run(
        "const [a, b] = ['answer', 't9999'].map(id => document.getElementById(id).getBoundingClientRect());"
        "return b.top >= a.top - 1 && b.bottom <= a.bottom + 1"
    ), "the chosen token is out of sight"
    assert window.complaints() == []


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 390, 1280])
def test_every_width_and_theme_can_be_read(show: Any, width: int, theme: str) -> None:
    made = recording(len(WORDS), batch=2)
    made.risk[0] = torch.linspace(0, 1, len(WORDS))
    window = show(made, WORDS, "W" * 300)
    window.look(width, 800, theme)
    window.run("document.getElementById('answer').focus()")
    window.wait("document.querySelector('#risk-chart svg').getBoundingClientRect().right <= innerWidth")
    sizes = window.run("return [document.documentElement.scrollWidth, innerWidth]")
    assert sizes[0] <= sizes[1] == width, "the page is wider than the window"
    paper = window.run("return getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(20, 21, 24)") == (theme == "dark")
    found = window.run(CONTRAST)
    assert len(found) > 50
    assert [(round(ratio, 2), what) for ratio, what in found if ratio < 4.5] == []


def test_by_keyboard_alone(show: Any) -> None:
    made = recording(len(WORDS))
    window = show(made, WORDS)
    for _ in range(3):
        window.press("Tab")
        if window.run("return document.activeElement.id") == "answer":
            break
    assert window.run("return document.activeElement.id") == "answer"
    chosen = "return document.getElementById('answer').getAttribute('aria-activedescendant')"
    assert window.run(chosen) == "t0"
    for keys, wanted in ((["Right", "Right"], 2), (["Left"], 1), (["End"], 11), (["Right"], 11), (["Home"], 0)):
        window.press(*keys)
        assert window.run(chosen) == f"t{wanted}"
        selected = "return [...document.querySelectorAll('[aria-selected=true]')].map(node => node.id)"
        assert window.run(selected) == [f"t{wanted}"]
    for wanted in ("layer", "measure"):
        window.press("Tab")
        assert window.run("return document.activeElement.id") == wanted
        assert window.run("return document.activeElement.labels[0].textContent").strip()


def details(window: Browser) -> dict[str, float]:
    rows = window.run(
        "return [...document.querySelectorAll('#details tbody tr')].map(row => [...row.cells].map(c => c.textContent))"
    )
    return {name: float(value) for name, value, _ in rows}


def test_numbers_are_those_of_the_token_and_layer(show: Any) -> None:
    made = recording(len(WORDS))
    window = show(made, WORDS)
    values = made.descriptors[0].view(len(WORDS), 3, -1)
    change = "const s = document.getElementById(arguments[0]); s.value = arguments[1]; s.onchange({ target: s })"
    for token, layer in ((4, -1), (4, 2), (9, 0)):
        window.hover(f"#t{token}")
        window.run(change, "layer", layer)
        name = "mean of the layers" if layer < 0 else f"layer{3 * layer}"
        window.wait(f"document.getElementById('details').caption.textContent === '{name}'")
        wanted = values[token].mean(0) if layer < 0 else values[token, layer]
        assert details(window) == pytest.approx(dict(zip(DESCRIPTORS, wanted.tolist(), strict=True)), rel=1e-3)
        assert f"step {token} · risk {float(made.risk[0, token]):.3f}"[:-1] in window.run(
            "return document.getElementById('token').textContent"
        )


def test_lines_and_strips_are_those_of_the_recording(show: Any) -> None:
    made = recording(len(WORDS))
    window = show(made, WORDS)
    path = window.run("return document.querySelector('#risk-chart .strong').getAttribute('d')")
    points = torch.tensor([[float(v) for v in point.split()] for point in path[1:].split("L")])
    risk = made.risk[0]
    assert len(points) == len(risk)
    height = (points[:, 1] - points[:, 1].min()) / (points[:, 1].max() - points[:, 1].min())
    torch.testing.assert_close(1 - height, (risk - risk.min()) / (risk.max() - risk.min()), rtol=0, atol=2e-3)
    assert window.run("return document.querySelectorAll('#measure-chart path').length") == 4, (
        "three layers and their mean"
    )
    for layer in range(3):
        pixels = window.run(
            "const c = document.querySelectorAll('.strip canvas')[arguments[0]];"
            "return [c.width, c.height, ...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]",
            layer,
        )
        assert pixels[:2] == [len(WORDS), 4]
        image = torch.tensor(pixels[2:]).view(4, len(WORDS), 4).transpose(0, 1)  # step, rank, RGBA
        eigenvalues = made.eigenvalues[0, :, layer]
        assert torch.equal(image[..., 3] == 255, eigenvalues > 0), "absent eigenvalues are drawn"
        order = eigenvalues.flatten().argsort()[(eigenvalues == 0).sum() :]
        green = image[..., 1].flatten()[order]
        assert (green.diff() >= 0).all() and green[-1] > green[0], "a larger eigenvalue is not lighter"


def test_the_gate_is_where_it_would_have_fired(show: Any) -> None:
    made = recording(len(WORDS))
    made.risk[0] = torch.tensor([0.1, 0.2, math.nan, 0.9, 0.95, 0.3, 0.96, 0.1, 0.1, 0.1, 0.1, 0.1])
    window = show(made, WORDS, threshold=0.9)
    ids = "return [...document.querySelectorAll(arguments[0])].map(node => Number(node.id.slice(1)))"
    assert window.run(ids, "#answer > .gate") == [4], "0.9 itself is not above 0.9 (stop_above)"
    assert window.run(ids, "#answer > .over") == [6]
    assert window.run(ids, "#answer > .unknown") == [2]
    assert window.run(ids, "#answer > .late") == [6, 7, 8, 9, 10, 11], "one more token had been chosen"
    assert "would have fired at step 4" in window.run("return document.getElementById('verdict').textContent")
    assert window.run("return document.querySelectorAll('#risk-chart .fired').length") == 1
    assert "gate" in window.run("return document.getElementById('t4').getAttribute('aria-label')")
    # Not by colour alone: the rule below a token is the thicker the higher its risk.
    rules = (
        "return [1, 3, 4].map(i => parseFloat(getComputedStyle(document.getElementById('t' + i)).borderBottomWidth))"
    )
    low, high, highest = window.run(rules)
    assert low < high <= highest and high >= 3
    window = show(made, WORDS, threshold=0.97)
    assert "would not have fired" in window.run("return document.getElementById('verdict').textContent")


def test_without_a_detector_the_page_does_not_speak_of_risk(show: Any) -> None:
    made = recording(len(WORDS), risk=False)
    window = show(made, WORDS)
    assert window.run("return document.getElementById('risk-figure').hidden")
    assert window.run("return document.getElementById('verdict').textContent") == ""
    assert window.run("return document.getElementById('legend').textContent").startswith("No detector, so no risk.")
    entropy = made.descriptors[0].view(len(WORDS), 3, -1)[..., DESCRIPTORS.index("entropy")].mean(1)
    levels = window.run(
        "return [...document.querySelectorAll('#answer > span')].map(t => Number(t.style.getPropertyValue('--level')))"
    )
    wanted = (entropy - entropy.min()) / (entropy.max() - entropy.min())
    torch.testing.assert_close(torch.tensor(levels), wanted, rtol=0, atol=1e-3)


def test_an_answer_without_tokens(window: Browser, tmp_path: Path) -> None:
    write_report(tmp_path / "run.html", runs_of(recording(0), prompts=["Why?"], threshold=0.5))
    window.complaints()
    window.open((tmp_path / "run.html").as_uri())
    window.wait("document.getElementById('status').textContent.includes('0 tokens')")
    window.run("document.getElementById('answer').focus()")
    window.press("Right", "End")
    assert window.complaints() == []
