"""What the README promises at its top."""

import pathlib
import re

import nm_jax as nm

README = (pathlib.Path(__file__).parents[1] / "README.md").read_text()


def test_quick_start_is_two_commands():
    section = README.split("## Quick start")[1].split("\n## ")[0]
    blocks = re.findall(r"```bash\n(.*?)```", section, re.DOTALL)
    assert len(blocks) == 1
    commands = blocks[0].strip().splitlines()
    assert len(commands) == 2
    assert "experiments quickstart" in commands[0]
    assert commands[1].endswith("-m pytest")


def test_names_in_the_readme_exist():
    used = set(re.findall(r"\bnm\.(\w+)", README))
    assert used
    assert not [name for name in used if not hasattr(nm, name)]
    table = README.split("## Which solver when")[1].split("\n## ")[0]
    named = set(re.findall(r"`(\w+)\((?:complete=False)?\)`", table))
    solvers = {
        name
        for name, value in vars(nm.solvers).items()
        if isinstance(value, type) and issubclass(value, nm.solvers.Solver) and value is not nm.solvers.Solver
    }
    assert named == solvers
