"""How fast `nm-jax prune` is, and how much memory it takes: a 2 GB checkpoint of 64 MB tensors to 4:8-T.

The command runs in a process of its own, whose peak memory the system reports. 4 GB of disk are needed. The targets are
a peak below 1.5 GB and 100 MB/s on 2 cores.

Paper: none
Time: 2 minutes on 2 cores
Data: none
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from experiments.harness import Experiment, Run, Table

PATTERN = "4:8-T"
TENSOR_BYTES, TENSORS, WIDTH = 64 << 20, 32, 4096
QUICK_BYTES, QUICK_TENSORS = 1 << 20, 2
DTYPES = {"F32": np.float32, "F16": np.float16}
LIMITS = {"peak_bytes": 1.5e9, "bytes_per_second": 100e6}


def write_checkpoint(path: Path, dtype: str, count: int, tensor_bytes: int) -> int:
    """A file of `count` Gaussian weights of one dtype, written tensor by tensor; returns its size."""
    rows = tensor_bytes // np.dtype(DTYPES[dtype]).itemsize // WIDTH
    header = {
        f"layers.{k}.weight": {
            "dtype": dtype,
            "shape": [rows, WIDTH],
            "data_offsets": [k * tensor_bytes, (k + 1) * tensor_bytes],
        }
        for k in range(count)
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    rng = np.random.default_rng(0)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _ in range(count):
            file.write(rng.standard_normal((rows, WIDTH), np.float32).astype(DTYPES[dtype]).tobytes())
    return path.stat().st_size


def prune(folder: Path, dtype: str, count: int, tensor_bytes: int) -> dict:
    """Time, memory and the share of time spent solving, of one run of the command."""
    source, target = folder / "in.safetensors", folder / "out.safetensors"
    size = write_checkpoint(source, dtype, count, tensor_bytes)
    arguments = ["prune", str(source), str(target), "--pattern", PATTERN, "--json"]
    start = time.perf_counter()
    # A child of a small process of its own: the peak of all children is that of this one.
    script = (
        "import resource, subprocess, sys; code = subprocess.call(sys.argv[1:], stdout=sys.stderr.fileno()); "
        "used = resource.getrusage(resource.RUSAGE_CHILDREN); "
        "print(code, used.ru_maxrss, used.ru_utime + used.ru_stime)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, sys.executable, "-m", "nm_jax.cli", *arguments],
        capture_output=True,
        text=True,
        check=True,
    )
    wall = time.perf_counter() - start
    code, peak, cpu = map(float, done.stdout.split())
    if code:
        raise RuntimeError(done.stderr)
    report = json.loads(done.stderr[done.stderr.index("{") :])
    seconds = report["seconds"]
    source.unlink()
    target.unlink()
    return {
        "dtype": dtype,
        "bytes": size,
        "tensors": count,
        "seconds": wall,
        "bytes_per_second": size / wall,
        "cpu_seconds": cpu,  # of all cores; far below cores * seconds, other programs were running
        "peak_bytes": int(peak) * (1 if sys.platform == "darwin" else 1024),
        "solving": seconds["solve"] / wall,
        "reading": seconds["read"] / wall,
        "writing": seconds["write"] / wall,
        "ok": report["ok"] and all(tensor["gap"] == 0 for tensor in report["tensors"]),
    }


def measure(run: Run) -> dict:
    """Both dtypes."""
    sizes = (QUICK_TENSORS, QUICK_BYTES) if run.quick else (TENSORS, TENSOR_BYTES)
    with tempfile.TemporaryDirectory() as folder, run.progress() as progress:
        rows = [prune(Path(folder), dtype, *sizes) for dtype in progress.track(DTYPES, description="prune")]
    return {"pattern": PATTERN, "runs": rows}


def tables(result: dict) -> list[Table]:
    """Speed, memory, and where the time goes."""
    header = ("dtype", "size", "time", "MB/s", "core time", "peak memory", "solving", "reading", "writing")
    rows = [
        (
            row["dtype"],
            f"{row['bytes'] / 1e9:.2f} GB",
            f"{row['seconds']:.1f} s",
            f"{row['bytes_per_second'] / 1e6:.0f}",
            f"{row['cpu_seconds']:.1f} s",
            f"{row['peak_bytes'] / 1e9:.2f} GB",
            *(f"{100 * row[part]:.0f} %" for part in ("solving", "reading", "writing")),
        )
        for row in result["runs"]
    ]
    within = all(
        row["peak_bytes"] < LIMITS["peak_bytes"] and row["bytes_per_second"] >= LIMITS["bytes_per_second"]
        for row in result["runs"]
    )
    notes = (
        f"Limits of {LIMITS['peak_bytes'] / 1e9} GB and {LIMITS['bytes_per_second'] / 1e6:.0f} MB/s: "
        f"{'kept' if within else 'NOT kept'}. Times are of the whole command, start and compilation included."
    )
    return [Table("prune", header, rows, f"nm-jax prune --pattern {result['pattern']}", notes)]


def problems(result: dict) -> list[str]:
    """A tensor without its pattern, or without the proof that its mask is the optimum."""
    return [f"{row['dtype']}: a tensor is not as it should be" for row in result["runs"] if not row["ok"]]


EXPERIMENT = Experiment(measure, tables, problems=problems)
