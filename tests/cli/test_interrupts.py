"""What is left behind when a command ends early."""

import os
import signal
import time

import numpy as np
import pytest

import nm_jax as nm
from tests.cli.cases import process, write_model

LIMITED = """
import resource, sys
from nm_jax.cli import main

limit = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
sys.exit(main(sys.argv[2:]))
"""


def test_a_full_disk(tmp_path):
    """Simulated by a limit on the size of files."""
    model = write_model(tmp_path / "in", count=20, size=512)
    limit = model.stat().st_size // 2
    limited = process(LIMITED, limit, "prune", model, tmp_path / "out", "--pattern", "2:4")
    out, err = limited.communicate()
    assert limited.returncode == 3
    assert out == ""
    assert err == f"nm-jax: {tmp_path / 'out'}: File too large; files may not be so large here; write somewhere else\n"
    assert os.listdir(tmp_path) == ["in"]


SLOWLY = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts with it ignored
from nm_jax.checkpoint._tensorfile import TensorWriter
from nm_jax.cli import main

write = TensorWriter.write
def slow(self, *args):
    write(self, *args)
    print("wrote", flush=True)
    time.sleep(0.02)
TensorWriter.write = slow
sys.exit(main(sys.argv[1:]))
"""


def slowly(model, out):
    """A process that prunes, and tells of each tensor that it has written."""
    return process(SLOWLY, "prune", model, out, "--pattern", "2:4")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt(tmp_path, number):
    model = write_model(tmp_path / "in", count=20)
    pruning = slowly(model, tmp_path / "out")
    pruning.stdout.readline()
    pruning.send_signal(number)
    _, err = pruning.communicate()
    assert pruning.returncode == 130
    assert err.strip() == "nm-jax: interrupted, and nothing was written"
    assert os.listdir(tmp_path) == ["in"]


def kill_at(tmp_path, moment, k):
    """Kills a run after `moment` tensors (a fraction: in the middle of one); what is there then?"""
    model = tmp_path / "in"
    data = model.read_bytes()
    out = tmp_path / f"out{k}"
    pruning = slowly(model, out)
    for _ in range(int(moment)):
        pruning.stdout.readline()
    time.sleep(moment % 1 * 0.04)
    pruning.kill()
    pruning.communicate()
    assert model.read_bytes() == data
    if pruning.returncode == 0:  # it was done before
        assert nm.verify_checkpoint(out).ok
    else:
        assert not out.exists()


def test_killed(tmp_path):
    write_model(tmp_path / "in", count=10)
    for k, moment in enumerate((0.9, 15.3)):
        kill_at(tmp_path, moment, k)


@pytest.mark.slow
def test_killed_at_fifty_moments(tmp_path):
    write_model(tmp_path / "in", count=10)
    for k, moment in enumerate(np.random.default_rng(0).uniform(0, 32, 50)):
        kill_at(tmp_path, moment, k)


BUSY = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts with it ignored
import nm_jax.checkpoint._prune as prune
from nm_jax.cli import main

def find_mask(*args):
    print("solving", flush=True)
    time.sleep(60)  # as a large tensor, or the compiler, does
prune.find_mask = find_mask
sys.exit(main())
"""


def test_an_interrupt_does_not_wait_for_a_mask(tmp_path):
    model = write_model(tmp_path / "in", count=2)
    pruning = process(BUSY, "prune", model, tmp_path / "out", "--pattern", "2:4")
    pruning.stdout.readline()
    pruning.send_signal(signal.SIGINT)
    _, err = pruning.communicate(timeout=20)
    assert pruning.returncode == 130
    assert err.strip() == "nm-jax: interrupted, and nothing was written"
    assert os.listdir(tmp_path) == ["in"]


LOADING = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path.insert(0, sys.argv[1])
from nm_jax.cli._late import Late
from nm_jax.cli._signals import catch

catch(ctrl_c=True)
Late("slow").anything
"""
SLOW = """
import time
print("loading", flush=True)
try:
    time.sleep(60)
except KeyboardInterrupt:
    print("raised in the middle")  # where compiled modules crash
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_while_modules_are_loaded(tmp_path, number):
    (tmp_path / "slow.py").write_text(SLOW)
    loading = process(LOADING, tmp_path)
    assert loading.stdout.readline() == "loading\n"
    loading.send_signal(number)
    out, err = loading.communicate(timeout=20)
    assert (loading.returncode, out, err) == (130, "", "nm-jax: interrupted, and nothing was written\n")
