"""The way the modules may import each other."""

import ast
import graphlib
import pathlib

import pytest

import nm_jax

ROOT = pathlib.Path(nm_jax.__file__).parent
# Each room may import from rooms of a smaller number only, and from its own.
FLOORS = {
    "_core": 0,
    "solvers": 1,
    "matmul": 1,
    "_masks": 2,
    "_model": 2,
    "_training": 3,
    "_reconstruct": 3,
    "recipes": 4,
    "checkpoint": 4,
    "cli": 5,
}
# Functions that import a module of ours, and why not at the top.
LATE = {
    ("matmul/ampere.py", "_kernel"): "Pallas takes longer to import than all of the library",
    ("matmul/hopper.py", "_kernel"): "Pallas takes longer to import than all of the library",
}
MODULES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def room(module):
    """`nm_jax.solvers.base` -> `solvers`."""
    return module.removeprefix("nm_jax.").split(".")[0]


def late(path, node):
    return isinstance(node, ast.FunctionDef) and (path.relative_to(ROOT).as_posix(), node.name) in LATE


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            if node.module == "nm_jax":
                yield from (f"nm_jax.{name.name}" for name in node.names if name.name != "__version__")
            else:
                yield node.module or "relative"
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_upwards(path):
    here = room("nm_jax." + ".".join(path.relative_to(ROOT).with_suffix("").parts))
    assert here in FLOORS, f"give {here} a floor"
    for module in imports(path):
        if module.startswith("nm_jax") or module == "relative":
            assert FLOORS[room(module)] <= FLOORS[here], f"{here} imports {module}"
            if FLOORS[room(module)] == FLOORS[here]:
                assert room(module) == here, f"{here} imports its neighbour {module}"


def test_modules_do_not_import_each_other_in_circles():
    """Any module can be the first that is loaded."""
    files = {"nm_jax." + ".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in MODULES}
    files = {name.removesuffix(".__init__"): path for name, path in files.items()}
    graph = {}
    for name, path in files.items():
        needed = {m for m in imports(path) if m in files}
        # A module loads the folder that it is in, and each one above it.
        graph[name] = needed | {m.rsplit(".", 1)[0] for m in needed if m.rsplit(".", 1)[0] in files}
        graph[name] -= {name, *(name[:k] for k in range(len(name)) if name[k] == ".")}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError


def test_no_import_hides_in_a_function():
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and not late(path, node):
                inner = [n for n in ast.walk(node) if isinstance(n, ast.Import | ast.ImportFrom)]
                assert not inner, f"{path.name}: {node.name} imports lazily"


def test_what_may_import_late_does():
    for name, function in LATE:
        tree = ast.parse((ROOT / name).read_text())
        [found] = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function]
        assert any(isinstance(node, ast.ImportFrom) for node in found.body)


def test_the_interface_of_solvers_knows_no_solver():
    modules = set(imports(ROOT / "solvers" / "base.py"))
    assert {m for m in modules if m.startswith("nm_jax.solvers")} <= {"nm_jax.solvers._proof"}


def test_solvers_know_nothing_of_optax():
    for path in (ROOT / "solvers").glob("*.py"):
        assert not {m.split(".")[0] for m in imports(path)} & {"optax", "flax", "equinox"}


def test_the_library_needs_only_its_dependencies():
    allowed = {"jax", "jaxlib", "jaxtyping", "lazy_loader", "numpy", "optax", "scipy", "nm_jax"}
    standard = __import__("sys").stdlib_module_names
    for path in ROOT.rglob("*.py"):
        extra = {"click", "rich"} if path.parent.name == "cli" else set()
        assert {m.split(".")[0] for m in imports(path)} - standard <= allowed | extra, path.name


EXPERIMENTS = sorted((ROOT.parent / "experiments").rglob("*.py"))


def test_experiments_use_the_public_api_alone():
    assert EXPERIMENTS
    public = {"nm_jax", "nm_jax.solvers", "nm_jax.matmul"}
    for path in EXPERIMENTS:
        tree = ast.parse(path.read_text())
        for module in imports(path):
            if module.split(".")[0] == "nm_jax":
                known = module in public or (module.count(".") == 1 and not module.startswith("nm_jax._"))
                assert known and module.split(".")[-1] in {"nm_jax", *dir(nm_jax)}, f"{path.name} imports {module}"
        private = [n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr.startswith("_")]
        reached = [a for a in private if a in {"_core", "_masks", "_model", "_training", "_reconstruct"}]
        assert not reached, f"{path.name} reaches for {reached}"


def test_networks_and_data_know_nothing_of_pruning():
    for folder in ("data", "networks"):
        for path in EXPERIMENTS:
            if path.parent.name == folder:
                assert not [m for m in imports(path) if m.startswith("nm_jax")], path.name


def test_experiments_do_not_train_by_themselves():
    """`experiments/train/loop.py` has the only step of an optimiser."""
    loops = [path.relative_to(ROOT.parent).as_posix() for path in EXPERIMENTS if "apply_updates" in path.read_text()]
    assert loops == ["experiments/train/loop.py"]


def test_files_are_short():
    lines = {
        path: len(path.read_text().splitlines())
        for room in ("nm_jax", "tests", "experiments")
        for path in python_files(room)
    }
    assert not {str(path): count for path, count in lines.items() if count > 500}
    library = sorted(count for path, count in lines.items() if ROOT in path.parents)
    assert library[len(library) // 2] < 170


def python_files(room):
    return (ROOT.parent / room).rglob("*.py")
