"""Every code block of the README and of the documentation does what it says.

The Python blocks of a page run one after another, in one namespace, after the page's hidden comments
`<!-- setup ... -->`. A `text` block after one is what that printed. Lines of `bash` blocks that call `nm-jax` are run;
other commands must be known ones.
"""

import contextlib
import io
import pathlib
import re
import shlex

import jax
import pytest

from nm_jax.cli import main as nm_jax_command

ROOT = pathlib.Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_BLOCK = re.compile(r"^<!-- setup\n(?P<setup>.*?)^-->|^```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^```", re.S | re.M)
_KNOWN = ("pip install", "python3 -m venv", ".venv/bin/", "python -m experiments", "nm-jax", "eval ", "bash .ci/run")


def blocks(page):
    """(language, code, line) of every block of a page."""
    text = page.read_text()
    for found in _BLOCK.finditer(text):
        line = text[: found.start()].count("\n") + 1
        yield found["language"] or ("python" if found["setup"] else "text"), found["setup"] or found["code"], line


def run_command(line):
    """Runs a line of the shell that calls `nm-jax`, in this process."""
    assert nm_jax_command(shlex.split(line, comments=True)[1:]) == 0, line


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[pytest.mark.slow] * (page.name in ("training.md", "without-training.md")))
        for page in PAGES
    ],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_code_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    namespace, printed = {"__name__": "page"}, io.StringIO()
    for language, code, line in blocks(page):
        if language == "python":
            # Line numbers of the page, for whoever reads a traceback; JAX as it is by default.
            printed = io.StringIO()
            with jax.numpy_rank_promotion("allow"), contextlib.redirect_stdout(printed):
                exec(compile("\n" * line + code, str(page), "exec"), namespace)
        elif language == "bash":
            for command in code.replace("\\\n", " ").splitlines():
                if command.startswith("nm-jax "):
                    run_command(command)
                assert not command.strip() or command.startswith(("#", *_KNOWN)), f"{page.name}: {command}"
        elif language == "text":
            assert [line.rstrip() for line in printed.getvalue().splitlines()] == code.splitlines()
        else:
            assert language in ("console", "json", "yaml", "toml"), f"{page.name}:{line}: blocks of {language!r}?"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not re.match(r"[a-z]+:", target) and not target.startswith("#"):
            assert (page.parent / target.split("#")[0]).exists(), target
