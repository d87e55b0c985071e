"""The page: its figures, escaping of hostile text, and its behaviour in a browser without a network."""

import json
import re
from collections import Counter
from html.parser import HTMLParser

import pytest
import torch

from braces_cli.core.adapter.files import find_adapter
from braces_cli.core.adapter.reference import relevance_ref
from braces_cli.core.errors import ModelError
from braces_cli.inspection.report import render, report_data, visible

HOSTILE = [
    "<script>window.hacked = 1</script>",
    "</script><script>window.hacked = 1</script>",
    '"><img src=x onerror="window.hacked = 1">',
    "' onmouseover='window.hacked = 1",
    "{{ 7 * 7 }}",
    "&lt;b&gt;",
    "]]>\u2028\u202e",
]


@pytest.fixture
def data(session, lens, adapter_dir):
    """The data of the page of a tiny model with an adapter."""
    session.add_adapter(find_adapter(str(adapter_dir)))
    return report_data(session, lens, "the film is good")


def attacked(value):
    """The value with attacks in the place of texts."""
    if isinstance(value, dict):
        return {key: attacked(item) for key, item in value.items()}
    if isinstance(value, list):
        return list(HOSTILE) if value and isinstance(value[0], str) else [attacked(item) for item in value]
    return HOSTILE[2] if isinstance(value, str) else value


@pytest.fixture
def hostile(data):
    """The data with an attack in every token, name and setting."""
    return attacked(data) | {"training": {HOSTILE[0]: HOSTILE[1]}}


def test_page_has_the_figures_of_the_model(session, data):
    """Gates, value vectors and attributes against direct computations; one button per cell of the heat map."""
    modules = session.adapter.adapted_ffns
    assert [row["gate"] for row in data["gates"]] == [float(module.g) for _, module in modules]
    assert {attribute["name"] for attribute in data["attributes"]} == {"positive", "negative"}
    assert all(len(row["tokens"]) == 8 for each in data["attributes"] for row in each["layers"])
    assert all(sum(row["share"] for row in each["layers"]) == pytest.approx(1) for each in data["attributes"])
    assert data["attributes"][0]["examples"][0]["prompt"] == "the film is good"

    strengths = [row["strength"] for row in data["amplified"]]
    assert min(strengths) > 0
    assert strengths == sorted(strengths, reverse=True)
    first = data["amplified"][0]
    ffn, module = modules[first["layer"]]
    seen = []
    handle = ffn.keys[0].register_forward_pre_hook(lambda m, args: seen.append(args[0][0]))
    with torch.no_grad():
        session.base.model(torch.tensor([session.base.tokenizer("the film is good")["input_ids"]]))
    handle.remove()
    r = relevance_ref(seen[0], ffn.value_matrix(), module)[:, first["index"]]
    expected = (module.g * r).abs().mean() * ffn.value_matrix()[:, first["index"]].norm()
    assert first["strength"] == pytest.approx(float(expected), rel=1e-3)

    html = render(data)
    for title in ("Contribution of each layer", "Gates", "Most amplified value vectors", "Attributes"):
        assert title in html
    assert html.count("<button") == 2 * len(data["heat"]["tokens"])


def test_page_without_an_adapter_or_direct_effects(session, lens, monkeypatch):
    """The page of a base has no gates; without direct effects it has the reason instead of the heat map."""

    def refuse(*args, **kwargs):
        raise ModelError("layer 0 changes its FFN's output")

    monkeypatch.setattr("braces_cli.inspection.report.trace", refuse)
    html = render(report_data(session, lens, "the film"))
    assert "Strongest value vectors" in html
    assert "h-gates" not in html
    assert "No heat map for this model: layer 0 changes" in html


class Tags(HTMLParser):
    """Parser that counts tags and collects the names of attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()
        self.attributes: set[str] = set()

    def handle_starttag(self, tag, attrs):
        self.count[tag] += 1
        self.attributes |= {name for name, _ in attrs}


def test_hostile_text_never_becomes_markup(hostile):
    """Two scripts, the page's and its data; tokens add no tag, handler or address."""
    html = render(hostile)
    seen = Tags()
    seen.feed(html)
    assert seen.count["script"] == 2
    assert "img" not in seen.count
    assert not [name for name in seen.attributes if name.startswith("on")]
    assert "{{ 7 * 7 }}" in html
    assert not re.search(r"(src|href)=\"(?!data:)", html)
    assert "http://" not in html.replace("http://www.w3.org", "")
    assert "https://" not in html
    data = re.search(r'id="data">(.*?)</script>', html, re.S)
    assert data is not None
    assert json.loads(data[1])["tokens"] == hostile["heat"]["tokens"]


def test_visible_tokens():
    """Spaces, control characters and direction marks are visible."""
    assert visible(" happy") == "·happy"
    assert visible("\n\t") == "\\n\\t"
    assert visible("  ") == "··"
    assert visible("a\u202eb") == "a\\u202eb"


def test_in_a_browser(browser, hostile, tmp_path):
    """No error, no request; cells react to mouse and keys; hostile tokens are text."""
    path = tmp_path / "report.html"
    path.write_text(render(hostile), encoding="utf-8")
    page = browser.new_page()
    logged, requested = [], []
    page.on("console", lambda message: logged.append(message.text))
    page.on("pageerror", lambda error: logged.append(str(error)))
    page.on("request", lambda request: requested.append(request.url))
    page.goto(path.as_uri())
    page.locator("#heat button").first.click()
    panel = page.locator("#cell")
    assert HOSTILE[0] in panel.inner_text()
    assert panel.locator("tbody tr").count() == 5
    assert page.locator("#heat button").first.get_attribute("aria-pressed") == "true"
    before = panel.inner_text()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    assert panel.inner_text() != before
    focused = page.evaluate("document.activeElement.dataset.row + ':' + document.activeElement.dataset.column")
    assert focused == "1:1"
    assert page.locator('#heat button[tabindex="0"]').count() == 1
    assert page.evaluate("window.hacked") is None
    assert page.locator("img").count() == 0
    assert visible(HOSTILE[0]) in page.locator("h2#h-amplified ~ .scroll").first.inner_text()
    assert logged == []
    assert [url for url in requested if not url.startswith(("file:", "data:"))] == []
