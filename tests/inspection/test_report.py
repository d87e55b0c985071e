"""The page: what is on it, that hostile tokens stay text, and that it works in a browser without a network."""

from __future__ import annotations

import json
import re
from collections import Counter
from html.parser import HTMLParser

import pytest

from braces_cli.core.adapter.files import find_adapter
from braces_cli.inspection.report import render, report_data, visible
from tests.cli.test_app import imported_by

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
def data(session, adapter_dir):
    """What the page of a tiny model with an adapter shows."""
    session.add_adapter(find_adapter(str(adapter_dir)))
    return report_data(session, "the film is good")


@pytest.fixture
def hostile(data):
    """The same with every token, name and setting an attack."""
    heat = data["heat"]
    heat["tokens"] = [HOSTILE[i % len(HOSTILE)] for i in range(len(heat["tokens"]))]
    heat["targets"] = list(reversed(heat["tokens"]))
    for row in heat["layers"]:
        for cell in row["cells"]:
            for s in cell["sub_updates"]:
                s["tokens"] = list(HOSTILE)
    for row in data["amplified"]:
        row["tokens"] = list(HOSTILE)
    for attribute in data["attributes"]:
        attribute["name"] = HOSTILE[0]
        for row in attribute["layers"]:
            row["tokens"] = list(HOSTILE)
    data["model"] = data["adapter"] = HOSTILE[2]
    data["training"] = {HOSTILE[0]: HOSTILE[1]}
    data["figures"] = {HOSTILE[1]: HOSTILE[0]}
    return data


def test_everything_is_on_it(session, data):
    """Gates, vectors, heat map, attributes: figures of the model, not of another."""
    import torch

    assert [row["gate"] for row in data["gates"]] == [
        float(adapter_layer.g) for _, adapter_layer in session.adapter.adapted_ffns
    ]
    assert {attribute["name"] for attribute in data["attributes"]} == {"positive", "negative"}
    adapter_layer, p = session.adapter.adapted_ffns[1][1], None
    from braces_cli.core.attributes.lookup import find_attribute

    p = find_attribute(session, data["attributes"][0]["name"], None).state[1]
    share = float((adapter_layer.projection() @ p).norm() / p.norm())
    assert data["attributes"][0]["layers"][1]["alignment"] == pytest.approx(share, rel=1e-4)
    sizes = [row["strength"] for row in data["amplified"]]
    assert min(sizes) > 0
    assert all(len(row["tokens"]) == 8 for each in data["attributes"] for row in each["layers"])
    assert sizes == sorted(sizes, reverse=True)
    first = data["amplified"][0]
    ids = torch.tensor([session.base.tokenizer("the film is good")["input_ids"]])
    ffn, adapter_layer = session.adapter.adapted_ffns[first["layer"]]
    seen = []
    handle = ffn.keys[0].register_forward_pre_hook(lambda m, args: seen.append(args[0][0]))
    with torch.no_grad():
        session.base.model(ids)
    handle.remove()
    from braces_cli.core.adapter.reference import relevance_ref

    r = (
        adapter_layer.g
        * relevance_ref(seen[0], ffn.value_matrix(), adapter_layer.weight, adapter_layer.scale)[:, first["index"]]
    )
    norm = ffn.value_matrix()[:, first["index"]].norm()
    assert first["strength"] == pytest.approx(float(r.abs().mean() * norm), rel=1e-3)
    html = render(data)
    for title in ("What each layer adds", "Gates", "Most amplified value vectors", "Attributes"):
        assert title in html
    assert html.count("<button") == 2 * len(data["heat"]["tokens"])


def test_with_an_adapter_no_gradient_is_followed(session, adapter_dir, monkeypatch):
    """Relevance through an adapter needs p alone, and a backward pass a text is what takes long."""
    session.add_adapter(find_adapter(str(adapter_dir)))
    monkeypatch.setenv("BRACES_CACHE", "off")
    monkeypatch.setattr("braces_cli.core.attributes.vector.cheapest_directions", None)
    assert report_data(session)["attributes"]


def test_without_an_adapter(session):
    """The bare model has a page, too, without gates."""
    html = render(report_data(session, "the film"))
    assert "Strongest value vectors" in html
    assert "h-gates" not in html


def test_an_architecture_without_direct_effects_has_a_page_that_says_so(session, monkeypatch):
    """Instead of the heat map."""
    import braces_cli.inspection.report as report
    from braces_cli.core.errors import ModelError

    def refuse(*args, **kwargs):
        raise ModelError("layer 0 changes its FFN's output before it joins the stream")

    monkeypatch.setattr(report, "trace", refuse)
    assert "No heat map for this model: layer 0 changes" in render(report_data(session, "the film"))


class Tags(HTMLParser):
    """What a parser of HTML finds: tags with their number, and every attribute's name."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()
        self.attributes: set[str] = set()

    def handle_starttag(self, tag, attrs):
        self.count[tag] += 1
        self.attributes |= {name for name, _ in attrs}


def test_hostile_text_never_becomes_markup(hostile):
    """One script of ours and one of data; no tag, handler or address that a token brought."""
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


def test_spaces_and_control_characters_show():
    """Nothing invisible, nothing that turns the line around."""
    assert visible(" happy") == "·happy"
    assert visible("\n\t") == "\\n\\t"
    assert visible("  ") == "··"
    assert visible("a\u202eb") == "a\\u202eb"


def test_figures_of_the_model_card(session, adapter_dir):
    """The Result table, where training wrote one."""
    (adapter_dir / "README.md").write_text(
        "# x\n\n## Result\n\n| | |\n|---|---|\n| eval loss | 2.5 |\n\n## Settings\n\n| rank | 4 |\n"
    )
    session.add_adapter(find_adapter(str(adapter_dir)))
    assert report_data(session, "the film")["figures"] == {"eval loss": "2.5"}


def test_help_stays_light():
    """No torch for a help page."""
    assert imported_by("from braces_cli.cli.main import main; main(['inspect', 'report', '--help'])") == set()


def opened(browser, html, tmp_path, **context):
    """The page in a fresh tab, with what it logged and what it asked the network for."""
    path = tmp_path / "report.html"
    path.write_text(html, encoding="utf-8")
    page = browser.new_context(**context).new_page()
    logged, asked = [], []
    page.on("console", lambda message: logged.append(message.text))
    page.on("pageerror", lambda error: logged.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(path.as_uri())
    return page, logged, [url for url in asked if not url.startswith(("file:", "data:"))]


def test_in_a_browser(browser, hostile, tmp_path):
    """No error, no request, cells answer to mouse and keys, and hostile tokens are read as text."""
    page, logged, asked = opened(browser, render(hostile), tmp_path)
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
    assert HOSTILE[0] in page.locator("h2#h-amplified ~ .scroll").first.inner_text()
    assert logged == []
    assert asked == []
    page.context.close()


def test_a_browser_that_runs_what_tokens_say_would_be_noticed(browser, hostile, tmp_path):
    """The test above can see: the same tokens without escaping do run where the policy is taken off, too."""
    html = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", render(hostile))
    html = html.replace("</main>", HOSTILE[0] + "</main>")
    page, _, _ = opened(browser, html, tmp_path)
    assert page.evaluate("window.hacked") == 1
    page.context.close()


def test_bars_and_rows_fit_on_a_phone(browser, data, tmp_path):
    """Coefficients above 1 do not make bars longer than their line, and no table but the heat map scrolls sideways."""
    for row in data["gates"]:
        row["gate"] = 1.4
    page, _, _ = opened(browser, render(data), tmp_path, viewport={"width": 390, "height": 800})
    wide = "[...document.querySelectorAll('.scroll')].filter(box => box.scrollWidth > box.clientWidth)"
    assert page.evaluate(f"{wide}.map(box => box.ariaLabel)") in ([], ["Heat map, scrolls sideways"])
    bars = page.evaluate(
        "[...document.querySelectorAll('.bar')].map(b => [b.offsetWidth, b.parentElement.clientWidth])"
    )
    assert bars
    assert all(0 < bar <= line for bar, line in bars)
    # Tokens on a line of their own need a few lines, not one a letter.
    assert max(page.evaluate("[...document.querySelectorAll('.stack .tokens')].map(cell => cell.offsetHeight)")) < 120
    page.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_in_light_and_dark(browser, data, tmp_path, scheme):
    """The page itself never scrolls sideways, and its colours follow the scheme with readable contrast."""
    size = {"width": 360, "height": 740}
    page, logged, _ = opened(browser, render(data), tmp_path, viewport=size, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    colours = page.evaluate("[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]")
    back, front = (luminance(colour) for colour in colours)
    assert (back < front) == (scheme == "dark")
    assert (max(back, front) + 0.05) / (min(back, front) + 0.05) > 7
    assert logged == []
    page.context.close()


def luminance(colour: str) -> float:
    """Relative luminance of `rgb(r, g, b)`, as WCAG has it."""
    parts = [int(x) / 255 for x in re.findall(r"\d+", colour)[:3]]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_the_command(braces, adapter_dir, tmp_path):
    """Writes the page, refuses to overwrite it, and says what it wrote."""
    path = tmp_path / "report.html"
    args = ["inspect", "report", "--adapter", adapter_dir, "--output", path, "--prompt", "the <b> film"]
    made = braces(*args, "--format", "json").json
    assert made["bytes"] == path.stat().st_size > 10_000
    assert braces(*args).code == 2
    assert braces(*args, "--overwrite", "--target", "film").code == 0
    assert braces(*args, "--overwrite", "--target", "zebra").code == 2
