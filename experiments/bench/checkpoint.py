"""How fast `nm-jax prune` is, and how much memory it takes: a 2 GB checkpoint of 64 MB tensors to 4:8-T.

    python -m experiments.bench.checkpoint            # about 2 minutes on 2 cores, 4 GB of disk
    python -m experiments.bench.checkpoint --quick    # 256 MB

The command runs in a process of its own, whose peak memory the system reports. Writes
`experiments/results/bench_checkpoint_*.json`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from experiments.harness import RESULTS, core_count, device_name, results_stem

PATTERN = "4:8-T"
TENSOR_BYTES = 64 << 20
WIDTH = 4096
DTYPES = {"F32": np.float32, "F16": np.float16}
LIMITS = {"peak_bytes": 1.5e9, "bytes_per_second": 100e6}


def write_checkpoint(path: Path, dtype: str, count: int) -> int:
    """A file of `count` Gaussian weights of one dtype, written tensor by tensor; returns its size."""
    rows = TENSOR_BYTES // np.dtype(DTYPES[dtype]).itemsize // WIDTH
    header = {
        f"layers.{k}.weight": {
            "dtype": dtype,
            "shape": [rows, WIDTH],
            "data_offsets": [k * TENSOR_BYTES, (k + 1) * TENSOR_BYTES],
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


def prune(folder: Path, dtype: str, count: int) -> dict:
    """Time, memory and the share of time spent solving, of one run of the command."""
    source, target = folder / "in.safetensors", folder / "out.safetensors"
    size = write_checkpoint(source, dtype, count)
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


def print_table(console: Console, rows: list[dict]) -> None:
    """The results, and whether they are within the limits."""
    table = Table(title=f"nm-jax prune --pattern {PATTERN}, tensors of 64 MB")
    for column in ("dtype", "size", "time", "MB/s", "core time", "peak memory", "solving", "reading", "writing"):
        table.add_column(column, justify="left" if column == "dtype" else "right")
    for row in rows:
        table.add_row(
            row["dtype"],
            f"{row['bytes'] / 1e9:.2f} GB",
            f"{row['seconds']:.1f} s",
            f"{row['bytes_per_second'] / 1e6:.0f}",
            f"{row['cpu_seconds']:.1f} s",
            f"{row['peak_bytes'] / 1e9:.2f} GB",
            *(f"{100 * row[part]:.0f} %" for part in ("solving", "reading", "writing")),
        )
    console.print(table)
    within = all(
        row["peak_bytes"] < LIMITS["peak_bytes"] and row["bytes_per_second"] >= LIMITS["bytes_per_second"]
        for row in rows
    )
    console.print(
        f"limits of {LIMITS['peak_bytes'] / 1e9} GB and {LIMITS['bytes_per_second'] / 1e6:.0f} MB/s: "
        f"{'kept' if within else 'NOT kept'}; times are of the whole command, start and compilation included"
    )


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="256 MB, and no file of results")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON file")
    args = parser.parse_args()
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        rows = [prune(Path(folder), dtype, 4 if args.quick else 32) for dtype in DTYPES]
    print_table(console, rows)
    if args.quick:
        return
    record = {
        "device": device_name(),
        "cores": core_count(),
        "jax": jax.__version__,
        "pattern": PATTERN,
        "runs": rows,
    }
    path = results_stem(args.out, "bench/checkpoint").with_suffix(".json")
    path.write_text(json.dumps(record, indent=2) + "\n")
    console.print(f"wrote {path}")


if __name__ == "__main__":
    main()
