"""The reference has every public name, and the tables of the documentation every member."""

import pathlib
import re

import nm_jax as nm

DOCS = pathlib.Path(__file__).parents[2] / "docs"


def documented():
    return set(re.findall(r"^::: (nm_jax[\w.]+)$", "".join(p.read_text() for p in DOCS.glob("api/*.md")), re.M))


def test_every_public_name_is_in_the_reference():
    expected = {f"nm_jax.{name}" for name in dir(nm) if name not in ("matmul", "solvers")}
    expected |= {f"nm_jax.solvers.{name}" for name in dir(nm.solvers) if isinstance(getattr(nm.solvers, name), type)}
    known = documented()
    assert not {name for name in expected - known if name.replace("solvers.", "").replace("matmul.", "") not in known}


def test_the_table_of_solvers_has_every_solver():
    named = set(re.findall(r"^\| `(\w+)\(", (DOCS / "solvers.md").read_text(), re.M))
    solvers = {
        name
        for name in dir(nm.solvers)
        if isinstance(kind := getattr(nm.solvers, name), type)
        and issubclass(kind, nm.solvers.Solver)
        and kind is not nm.solvers.Solver
    }
    assert named == solvers
