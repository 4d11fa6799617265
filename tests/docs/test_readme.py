"""What the README promises at its top."""

import pathlib
import re

ROOT = pathlib.Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_quick_start_is_two_commands():
    section = README.split("## Quick start")[1].split("\n## ")[0]
    blocks = re.findall(r"```bash\n(.*?)```", section, re.DOTALL)
    assert len(blocks) == 1
    commands = blocks[0].strip().splitlines()
    assert len(commands) == 2
    assert "experiments quickstart" in commands[0]
    assert commands[1].endswith("-m pytest")


def test_it_is_short():
    assert len(README) < 6500
