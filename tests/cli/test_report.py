"""The page."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

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
