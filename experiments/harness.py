"""What a benchmark ran on, and where its results go."""

import os
import platform
import re
from pathlib import Path

import jax

RESULTS = Path(__file__).parent / "results"


def device_name() -> str:
    """The default device: `cpu x86_64`, `gpu NVIDIA H100`."""
    device = jax.devices()[0]
    return f"{device.platform} {platform.machine() if device.platform == 'cpu' else device.device_kind}"


def core_count() -> int | None:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def results_stem(folder: Path, experiment: str) -> Path:
    """Path of the results of an experiment on this device, without a suffix; makes the folder."""
    stem = folder / experiment / re.sub(r"[^a-z0-9]+", "-", device_name().lower())
    stem.parent.mkdir(parents=True, exist_ok=True)
    return stem
