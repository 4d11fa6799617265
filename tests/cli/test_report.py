"""The page."""

import json

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import nm_jax as nm
from tests.browser import Browser


@pytest.fixture
def page(run, model, tmp_path):
    """A page about a checkpoint with one broken tensor, and its JSON."""
    code, _, _ = run("prune", model, tmp_path / "out", "--pattern", "2:4-T", "--solver", "greedy")
    assert code == 0
    rules = ("--rule", "l1=1:4", "--pattern", "2:4-T")
    code, text, _ = run("report", tmp_path / "out", "-o", tmp_path / "page.html", *rules, "--dense", model, "--json")
    assert code == 1
    return tmp_path / "page.html", json.loads(text)


# Background and ink of the page.
COLOURS = """
(s => [s.backgroundColor, s.color].map(c => c.match(/[0-9]+/g).slice(0, 3).map(Number)))
(getComputedStyle(document.body))
"""
# How far the lines between tiles are from the edges of the entries, on the screen.
LINES = """
[...document.querySelectorAll('.mask')].flatMap(mask => {
  const image = mask.querySelector('img'), box = image.getBoundingClientRect(), path = mask.querySelector('path');
  const drawn = path.getScreenCTM(), rows = path.getAttribute('d').match(/M0 [0-9]+/g).map(m => +m.slice(3));
  return rows.map(row => drawn.f + drawn.d * row - (box.top + box.height / image.naturalHeight * row));
})
"""


def percent(share):
    return f"{100 * share:.2f}\u00a0%"


def test_the_page_is_self_contained(page):
    text = page[0].read_text()
    assert "<script" not in text
    assert "http://" not in text
    assert "https://" not in text
    assert "default-src 'none'" in text
    assert text.count("data:image/png;base64,") == 3


def test_the_page_in_a_browser(page, tmp_path):
    path, table = page
    assert len(table["tensors"]) == 3
    with Browser(tmp_path / "profile") as browser:
        for width in (390, 1200):
            asked = browser.load(path.as_uri(), width)
            assert asked[0] == path.as_uri()
            assert all(url.startswith("data:") for url in asked[1:])
            assert browser.ask("document.documentElement.scrollWidth") <= width
            assert browser.ask("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
        cells = browser.ask(
            "[...document.querySelectorAll('table')][0].querySelectorAll('tbody tr').values()"
            ".map(r => Object.fromEntries([...r.cells].map(c => [c.dataset.label, c.textContent]))).toArray()"
        )
        bars = browser.ask("[...document.querySelectorAll('.bar em')].map(e => [e.dataset.tensor, e.textContent])")
        groups = browser.ask(
            "[...document.querySelectorAll('.groups')].map(t => [...t.rows].map(r => +r.cells[2].textContent))"
        )
        verdict = browser.ask("document.querySelector('dl').textContent")
        red = browser.ask(
            "[...document.querySelectorAll('table:not(.groups) tr.bad')].map(r => r.cells[0].textContent)"
        )
        full = browser.ask("[...document.querySelectorAll('.groups')].map(t => !!t.querySelector('.bad'))")
        lines = browser.ask(LINES)
        looks = {mode: (browser.prefer(mode), browser.ask(COLOURS))[1] for mode in ("light", "dark")}
        assert browser.pdf().startswith(b"%PDF")
    for row, tensor in zip(cells, table["tensors"], strict=True):
        assert row["tensor"] == tensor["name"]
        assert row["shape"] == "x".join(map(str, tensor["shape"]))
        assert (row["dtype"], row["pattern"], row["axes"]) == (tensor["dtype"], tensor["pattern"], tensor["axes"])
        assert row["kept"] == percent(tensor["kept"] / tensor["size"])
        assert row["retained"] == percent(tensor["retained"])
        assert row["violations W"] == str(tensor["violations"]["contraction"])
        assert row["violations W^T"] == str(tensor["violations"].get("output", ""))
    assert bars == [[tensor["name"], percent(tensor["of_unstructured"])] for tensor in table["tensors"]]
    assert groups == [tensor["groups"][axis] for tensor in table["tensors"] for axis in ("contraction", "output")]
    assert "1 violate their pattern" in verdict
    totals = table["totals"]
    assert f"parameters of all{totals['parameters']:,}" in verdict
    assert f"pruned of all{percent(totals['pruned'] / totals['parameters'])}" in verdict
    assert red == ["l1.weight"]
    # 1:4 asks nothing of W^T.
    assert full == [marked for tensor in table["tensors"] for marked in (not tensor["ok"], False)]
    assert lines and all(abs(line) < 0.51 for line in lines)  # pixels from where entries of two tiles meet
    assert min(looks["light"][0]) > 200 and max(looks["light"][1]) < 100
    assert max(looks["dark"][0]) < 60 and min(looks["dark"][1]) > 200
    assert [tensor["name"] for tensor in table["tensors"] if not tensor["ok"]] == ["l1.weight"]


def test_names_cannot_add_to_the_page(run, tmp_path):
    name = "<img src=x onerror=alert(1)>\"'.weight"
    save_file({name: np.ones((8, 8), np.float32)}, tmp_path / "in")
    code, _, _ = run("report", tmp_path / "in", "-o", tmp_path / "page.html", "--rule", "weight=2:4")
    assert code == 1
    assert "<img src=x" not in (tmp_path / "page.html").read_text()


def test_pictures_of_chosen_tensors(run, model, tmp_path):
    run("report", model, "-o", tmp_path / "page.html", "--pattern", "2:4", "--picture", "l[12]")
    text = (tmp_path / "page.html").read_text()
    assert text.count("data:image/png;base64,") == 2
    assert "<h3>l0.weight" not in text
    assert "<h3>l1.weight" in text


def test_experts_are_one_row_a_layer(run, tmp_path):
    """But for those that break their pattern."""
    rng = np.random.default_rng(0)
    names = [f"layers.{layer}.mlp.experts.{k}.w1.weight" for layer in range(2) for k in range(3)]
    save_file({name: rng.normal(size=(8, 8)).astype(np.float32) for name in names}, tmp_path / "in")
    rules = ("--rule", "experts=2:4@oi")
    assert run("prune", tmp_path / "in", tmp_path / "out", *rules)[0] == 0
    tensors = load_file(tmp_path / "out")
    with safe_open(tmp_path / "out", "np") as file:
        metadata = file.metadata()
    tensors[names[4]] = np.ones((8, 8), np.float32)
    save_file(tensors, tmp_path / "broken", metadata=metadata)
    assert run("report", tmp_path / "broken", "-o", tmp_path / "page.html")[0] == 1
    text = (tmp_path / "page.html").read_text()
    assert '<tr><td data-label="tensor">layers.0.mlp.experts.*.w1.weight (3)</td>' in text
    assert '<tr><td data-label="tensor">layers.1.mlp.experts.*.w1.weight (2)</td>' in text
    assert '<tr class=bad><td data-label="tensor">layers.1.mlp.experts.1.w1.weight</td>' in text
    assert text.count('class="bar"') == 3


def test_the_page_says_how_the_file_was_made(run, model, tmp_path):
    run("prune", model, tmp_path / "out", "--rule", "l0.weight=1:4@io", "--exclude", "l1", "--pattern", "2:4")
    run("report", tmp_path / "out", "-o", tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert f"Written by nm_jax {nm.__version__}" in text
    assert "<li><code>l1=dense</code></li><li><code>l0.weight=1:4@io</code></li><li><code>2:4</code></li>" in text
    run("report", model, "-o", tmp_path / "other.html", "--pattern", "2:4")
    assert "does not say how" in (tmp_path / "other.html").read_text()
