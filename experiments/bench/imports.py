"""What `import nm_jax` costs, against `import jax, optax`, which every user pays anyway.

Each import is timed in a fresh process, start of the interpreter included, all in turns; the ratio is of the medians.
The names of `nm_jax` are loaded when they are used: `import nm_jax` alone, and with one name of each room.

The target is 1.3 times `import jax, optax`.

Paper: none
Time: 2 minutes on 2 cores
Data: none
"""

import subprocess
import sys
import time

import numpy as np

from experiments.harness import Experiment, Run, Table

BASE = "import jax, optax"
STATEMENTS = (
    BASE,
    "import nm_jax",
    "import jax, optax, nm_jax; nm_jax.sparse_training, nm_jax.compute_masks, nm_jax.verify",
    "import jax, optax, nm_jax; [getattr(nm_jax, name) for name in dir(nm_jax)]",
)
TURNS = 9
TARGET = 1.3


def seconds(statement: str) -> float:
    """Of one fresh process."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True)
    return time.perf_counter() - start


def measure(run: Run) -> dict:
    """All statements, in turns."""
    measured: dict[str, list[float]] = {statement: [] for statement in STATEMENTS}
    with run.progress() as progress:
        for _ in progress.track(range(1 if run.quick else TURNS), description="imports"):
            for statement, times in measured.items():
                times.append(seconds(statement))
    return {"seconds": measured}


def ratios(result: dict) -> dict[str, float]:
    """Medians relative to that of `import jax, optax`."""
    medians = {statement: float(np.median(times)) for statement, times in result["seconds"].items()}
    return {statement: median / medians[BASE] for statement, median in medians.items()}


def tables(result: dict) -> list[Table]:
    """Median, spread and ratio of each."""
    rows = [
        (f"`{statement}`", f"{np.median(times):.2f}", f"{min(times):.2f} to {max(times):.2f}", f"{ratio:.2f}")
        for (statement, times), ratio in zip(result["seconds"].items(), ratios(result).values(), strict=True)
    ]
    notes = f"Fresh processes; ratio of medians (target for import nm_jax: {TARGET})."
    return [Table("imports", ("", "median, s", "range, s", "ratio"), rows, "What imports cost", notes)]


EXPERIMENT = Experiment(measure, tables)
