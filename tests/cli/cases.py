"""Checkpoints and processes that several tests use."""

import os
import pathlib
import subprocess
import sys

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

ROOT = pathlib.Path(__file__).parents[2]


def write_model(path, count=1, size=16):
    rng = np.random.default_rng(0)
    dtypes = (np.float32, np.float16, ml_dtypes.bfloat16)
    tensors = {f"l{k}.weight": rng.standard_normal((size, 24)).astype(dtypes[k % 3]) for k in range(3 * count)}
    tensors |= {"l0.bias": np.ones(size, np.float32), "ids": np.arange(5)}
    save_file(tensors, path, metadata={"format": "pt"})
    return path


def process(script, *arguments, **environment):
    """A script in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", **environment}
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
