"""Every public name says what it is, and its example runs."""

import doctest
import inspect
import re
import textwrap

import jax
import pytest

import nm_jax as nm


def is_own(member):
    """Whether a recipe, and not what the module imports."""
    return getattr(member, "__module__", "") == "nm_jax.recipes"


# What a caller gets back or derives from is shown by the function that returns it.
NAMES = [f"nm_jax.{name}" for name in dir(nm) if name not in ("solvers", "matmul", "recipes")]
NAMES += [f"nm_jax.recipes.{f.__name__}" for f in vars(nm.recipes).values() if is_own(f)]
NAMES += [f"nm_jax.solvers.{name}" for name in dir(nm.solvers) if isinstance(getattr(nm.solvers, name), type)]


def find(name):
    module, _, attribute = name.removeprefix("nm_jax").strip(".").rpartition(".")
    return getattr(getattr(nm, module) if module else nm, attribute)


def example(docstring):
    """The section `Examples:` of a docstring."""
    found = re.search(r"^Examples:\n((?:[ \t]+.*\n|\n)+)", inspect.cleandoc(docstring) + "\n", re.M)
    return textwrap.dedent(found[1]) if found else ""


@pytest.mark.parametrize("name", NAMES)
def test_the_example_runs(name, tmp_path, monkeypatch):
    docstring = find(name).__doc__
    assert docstring and docstring.strip(), f"{name} has no docstring"
    text = example(docstring)
    assert ">>> " in text, f"{name} has no `Examples:` section"
    monkeypatch.chdir(tmp_path)
    test = doctest.DocTestParser().get_doctest(text, {}, name, None, 0)
    output: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    with jax.numpy_rank_promotion("allow"):  # as it is by default
        failed, _ = runner.run(test, out=output.append)
    assert not failed, "".join(output)
