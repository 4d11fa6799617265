"""The paper's setting on a folder of images: steps of ResNet-50 as `configs/table_4 --preset paper` trains it.

Hubara et al., Table 4: ImageNet, batches of 256, 224 x 224. One image of each class, written out as an ImageNet folder,
is what is learned here, so that the losses say that training works and nothing about accuracy. The gradient is gone
for in parts of a batch, which hold less memory.

    NM_JAX_DATA=... python -m experiments bench/imagenet

Paper: Table 4
Time: 10 minutes on 2 cores
Data: 1000 images of ImageNet (NM_JAX_DATA)
"""

import dataclasses
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

from experiments.configs import table_4
from experiments.data import packed
from experiments.data.folders import ImageNet, imagenet
from experiments.harness import Experiment, Run, Table
from experiments.train import Training

VARIANTS = ("dense", "4:8-T")
STEPS, PARTS = 5, 16


def write(folder: Path, count: int) -> ImageNet:
    """The first images of the data folder as an ImageNet folder, the same to train and to test."""
    with np.load(packed.folder() / "vision" / "imagenet_sample1000.npz") as file:
        data, offsets = file["data"], file["offsets"].astype(np.int64)
    for part in ("train", "val"):
        for k in range(count):
            path = folder / part / f"class{k:04}" / "image.JPEG"
            path.parent.mkdir(parents=True)
            path.write_bytes(data[offsets[k] : offsets[k + 1]].tobytes())
    return imagenet(folder)


def measure(run: Run) -> dict:
    """Losses and seconds of every step, and the most memory that the process has held."""
    preset = table_4.STUDY.presets["paper"]
    # The schedule of a whole run would not have left its warm-up after so few steps.
    recipe = dataclasses.replace(preset.recipe, accumulate=PARTS, warmup=0, epochs=1000)
    if run.quick:
        recipe = dataclasses.replace(recipe, batch=4, accumulate=2)
    preset, steps = dataclasses.replace(preset, recipe=recipe), 2 if run.quick else STEPS
    rows = []
    with tempfile.TemporaryDirectory() as folder, run.progress() as display:
        data = write(Path(folder), 8 if run.quick else 1000)
        for variant in (each for each in table_4.VARIANTS if each.name in VARIANTS):
            tx = variant.sparse(recipe.optimiser(data.count // recipe.batch), list(table_4.STUDY.dense))
            training = Training(table_4.STUDY.learned(preset, data, None, 0), tx, steps, accumulate=recipe.accumulate)
            losses, seconds = [], []
            for _ in display.track(range(steps), description=variant.name):
                begun = time.perf_counter()
                losses.append(float(training.step()))
                seconds.append(time.perf_counter() - begun)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # kB on Linux
            rows.append({"name": variant.name, "losses": losses, "seconds": seconds, "peak_gib": peak})
            run.keep({"rows": rows})
            del training
    return {"batch": recipe.batch, "parts": recipe.accumulate, "rows": rows}


def tables(result: dict) -> list[Table]:
    """Every variant; the first step compiles and is left out of the time."""
    rows = [
        (
            row["name"],
            f"{row['losses'][0]:.2f}",
            f"{row['losses'][-1]:.2f}",
            f"{np.median(row['seconds'][1:]):.0f}",
            f"{row['peak_gib']:.1f}",
        )
        for row in result["rows"]
    ]
    header = ("", "first loss", "last loss", "step, s", "peak memory, GiB")
    title = f"ResNet-50, 224 x 224, batches of {result['batch']} in {result['parts']} parts"
    return [Table("steps", header, rows, title, "Memory: the most that the process has held until then.")]


EXPERIMENT = Experiment(measure, tables)
