"""Quick start: one small convolutional network, trained from scratch dense, 2:4, 2:4-T and 4:8-T on real digits.

Hubara et al., "Accelerated Sparse Neural Training: A Provable and Efficient Method to Find N:M Transposable Masks"
(NeurIPS 2021), Section 4: train sparse from scratch, refresh the masks from the dense weights every 40 updates. A
transposable mask (-T) is n:m along W, for the forward pass, *and* along W^T, for the backward pass.

    python -m experiments.quickstart

Expected: four networks with about the same test accuracy (differences below one point are noise: there are 719 test
images); 2:4 verified along W but not along W^T, the -T patterns along both; flip rates that fall as training settles.
The figure goes to `figures/quickstart.png`. About one minute on 2 cores, most of it training and compiling. Exits with
status 1 when a pattern does not hold.

The data are the handwritten digits that scikit-learn brings along (UCI; 1797 images of 8 x 8).
"""

import argparse
import os
import sys
import time
from pathlib import Path

# Before TensorStore and others are loaded by Flax: they take the log level from here.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import nm_jax as nm

PATTERNS = (None, "2:4", "2:4-T", "4:8-T")  # None: dense
COLOURS = {None: "#6b7280", "2:4": "#d97706", "2:4-T": "#2563eb", "4:8-T": "#059669"}
BATCH = 128
EVALUATE_EVERY = 20
REFRESH_EVERY = 40  # the paper's, and the default
PICTURED = "Conv_2"  # layer whose masks the figure shows
CORNER = 24  # rows and columns of it


# --------------------------------------------------------------------------------------------------------- training


class Network(nn.Module):
    """Three convolutions and two dense layers, 73,000 weights."""

    @nn.compact
    def __call__(self, images):
        x = nn.relu(nn.Conv(32, (3, 3))(images))
        x = nn.relu(nn.Conv(64, (3, 3), strides=2)(x))
        x = nn.relu(nn.Conv(64, (3, 3), strides=2)(x))
        x = nn.relu(nn.Dense(64)(x.reshape(len(x), -1)))
        return nn.Dense(10, name="head")(x)


def rules(pattern: str):
    """The head stays dense, as in the paper; every other kernel gets the pattern if it can have it."""
    return [("head", None), ("kernel", pattern)]


def make_optimiser(pattern: str | None, steps: int) -> optax.GradientTransformation:
    """Adam with a cosine schedule; sparse where a pattern is given."""
    optimiser = optax.adam(optax.cosine_decay_schedule(2e-3, steps, alpha=0.05))
    if pattern is not None:
        optimiser = nm.sparse_training(optimiser, rules(pattern))  # the one line that makes training sparse
    return optimiser


@jax.jit
def train_step(state: TrainState, images, labels) -> tuple[TrainState, jax.Array]:
    """One step of an ordinary Flax loop: it does not know about sparsity."""

    def loss(params):
        logits = state.apply_fn({"params": params}, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    value, grads = jax.value_and_grad(loss)(state.params)
    return state.apply_gradients(grads=grads), value


class Run:
    """The training of one network, and what is measured on the way."""

    def __init__(self, pattern: str | None, steps: int, seed: int):
        self.pattern = pattern
        self.name = pattern or "dense"
        network = Network()
        params = network.init(jax.random.key(seed), jnp.zeros((1, 8, 8, 1)))["params"]
        self.state = TrainState.create(apply_fn=network.apply, params=params, tx=make_optimiser(pattern, steps))
        self._logits = jax.jit(lambda params, images: network.apply({"params": params}, images))
        self.losses: list[jax.Array] = []
        self.seconds: list[float] = []
        self.accuracies: dict[int, float] = {}
        self.flips: dict[int, float] = {}

    def step(self, images, labels) -> None:
        """Trains on one batch."""
        start = time.perf_counter()
        self.state, loss = jax.block_until_ready(train_step(self.state, images, labels))
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(loss)
        if self.pattern and len(self.losses) % REFRESH_EVERY == 0:
            # Refreshed just now. All sparse weights count alike, in large layers and in small ones.
            sizes = [row.leaf.shape for row in nm.verify(self.state.params, rules(self.pattern)).rows]
            flips = nm.refresh_stats(self.state.opt_state).flip_rate
            self.flips[len(self.losses)] = float(np.average(flips, weights=[np.prod(s) for s in sizes]))

    def evaluate(self, images, labels) -> None:
        """Test accuracy now."""
        predicted = self._logits(self.state.params, images).argmax(axis=-1)
        self.accuracies[len(self.losses)] = float((predicted == labels).mean())

    @property
    def accuracy(self) -> float:
        """The last one."""
        return list(self.accuracies.values())[-1]


def load_data(seed: int = 0):
    """Digits as (train images, test images, train labels, test labels): a fixed, stratified split, 60 % to train."""
    digits = load_digits()
    images = (digits.images[..., None] / 16).astype(np.float32)
    return train_test_split(images, digits.target, test_size=0.4, stratify=digits.target, random_state=seed)


def train(steps: int, seed: int, console: Console) -> list[Run]:
    """Trains all networks side by side on the same batches: whatever else the machine does, it does to all of them."""
    train_images, test_images, train_labels, test_labels = load_data()
    runs = [Run(pattern, steps, seed) for pattern in PATTERNS]
    draw = np.random.default_rng(seed)
    with Progress(
        TextColumn("{task.description:<6}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}  test accuracy {task.fields[accuracy]:.1%}"),
        TimeElapsedColumn(),
        console=console,
    ) as progress:
        bars = [progress.add_task(run.name, total=steps, loss=float("nan"), accuracy=0.0) for run in runs]
        for step in range(steps):
            batch = draw.choice(len(train_images), BATCH, replace=False)
            for run, bar in zip(runs, bars, strict=True):
                run.step(train_images[batch], train_labels[batch])
                if step % EVALUATE_EVERY == 0 or step == steps - 1:
                    run.evaluate(test_images, test_labels)
                    progress.update(bar, loss=float(run.losses[-1]), accuracy=run.accuracy)
                progress.advance(bar)
    return runs


# ----------------------------------------------------------------------------------------------------- verification


def kernels(tree, pattern: str) -> dict[str, np.ndarray]:
    """Those kernels that the report calls sparse, as NumPy arrays."""
    report = nm.verify(tree, rules(pattern))
    return {row.leaf.path: np.asarray(tree[row.leaf.path.split("/")[0]]["kernel"]) for row in report.rows}


def fullest_group(kernel: np.ndarray, m: int, axis: int) -> int:
    """Most nonzeros among m neighbours along an axis. Slices of the kernel itself: nothing is reshaped, so that an
    error in the library's reshaping cannot hide here."""
    most = 0
    for start in range(0, kernel.shape[axis], m):
        group = kernel[..., start : start + m, :] if axis == -2 else kernel[..., start : start + m]
        most = max(most, int(np.count_nonzero(group, axis=axis).max()))
    return most


def check(run: Run) -> dict:
    """Measures a trained network: groups along W and W^T, by slicing and by `nm.verify`, and retained magnitude."""
    pattern = run.pattern or "2:4"  # the dense network is held against 2:4
    n, m = (int(number) for number in pattern.removesuffix("-T").split(":"))
    params = run.state.params
    report = nm.verify(params, rules(pattern))
    sparse = kernels(params, pattern)
    # Flax kernels end in (input, output): the forward pass contracts the one, the backward pass the other.
    along = {path: (fullest_group(k, m, axis=-2), fullest_group(k, m, axis=-1)) for path, k in sparse.items()}
    for path, counts in along.items():
        if counts != (int(report[path].contraction), int(report[path].output)):
            raise SystemExit(f"{path}: NumPy counts {counts} in the fullest group, nm.verify says {report[path]}")
    forward, backward = (max(counts) for counts in zip(*along.values(), strict=True))
    result = {"n": n, "m": m, "forward": forward, "backward": backward, "report": report, "ok": True}
    if run.pattern:
        both = run.pattern.endswith("-T")
        result["ok"] = report.ok and forward <= n and (backward <= n or not both)
        dense = kernels(nm.dense_params(run.state.opt_state, params), pattern)
        kept = sum(np.abs(dense[path][sparse[path] != 0]).sum() for path in sparse)
        largest = [np.sort(np.abs(dense[p]), axis=None)[::-1][: np.count_nonzero(sparse[p])] for p in sparse]
        result["retained"] = kept / sum(np.abs(d).sum() for d in dense.values())
        result["of_unstructured"] = kept / sum(values.sum() for values in largest)
    return result


# ----------------------------------------------------------------------------------------------------------- output


def timing(run: Run) -> tuple[float, float]:
    """Seconds of a step: the median, and the mean over whole refresh periods. The first period, which has the
    compilation, does not count."""
    periods = len(run.seconds) // REFRESH_EVERY
    seconds = run.seconds[REFRESH_EVERY : periods * REFRESH_EVERY] if periods > 1 else run.seconds[-5:]
    return float(np.median(seconds)), float(np.mean(seconds))


def print_table(runs: list[Run], checks: list[dict], console: Console) -> None:
    """All results as one table."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False)
    table.add_column("network")
    for column in (
        "test\naccuracy",
        "along\nW",
        "along\nW^T",
        "retained",
        "relative\nto US",
        "last\nflips",
        "step,\nmedian",
        "step,\nmean",
    ):
        table.add_column(column, justify="right")

    def verdict(most: int, result: dict, wanted: bool) -> str:
        text = f"{'yes' if most <= result['n'] else 'no'}, {most}/{result['m']}"
        if most <= result["n"]:
            return f"[green]{text}[/green]"
        return f"[bold red]{text}[/bold red]" if wanted else text

    median, mean = timing(runs[0])
    for run, result in zip(runs, checks, strict=True):
        own_median, own_mean = timing(run)
        sparse = run.pattern is not None
        table.add_row(
            run.name,
            f"{run.accuracy:.1%}",
            verdict(result["forward"], result, sparse),
            verdict(result["backward"], result, sparse and run.pattern.endswith("-T")),
            f"{result['retained']:.1%}" if sparse else "-",
            f"{result['of_unstructured']:.1%}" if sparse else "-",
            f"{list(run.flips.values())[-1]:.2%}" if run.flips else "-",
            f"{own_median / median:.2f}x" if sparse else f"{1e3 * median:.1f} ms",
            f"{own_mean / mean:.2f}x" if sparse else f"{1e3 * mean:.1f} ms",
        )
    console.print(table)
    console.print(
        "along W, W^T: most nonzeros in any group of m, by NumPy and by nm.verify (dense: against\n"
        "    2:4). 2:4 promises nothing along W^T.\n"
        "retained: share of the l1 norm of the dense weights that the masks keep, also relative to\n"
        "    unstructured masks (US). last flips: mask entries that the last refresh changed.\n"
        "step: time relative to dense, without and with refreshes. All networks multiply dense\n"
        "    arrays here; this is what masks cost, and sparse kernels are what turns them into speed.",
        style="dim",
        highlight=False,
        soft_wrap=True,
    )


def draw(runs: list[Run], checks: list[dict], path: Path) -> None:
    """Draws the training curves, the flip rates, and a corner of one layer's masks."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.patches import Rectangle

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure = plt.figure(figsize=(12.5, 8.2), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 1.12))
    losses, accuracies, flips = top.subplots(1, 3)

    for run in runs:
        style = {"color": COLOURS[run.pattern], "label": run.name, "lw": 1.6}
        smooth = running_mean(np.array(run.losses))
        losses.semilogy(np.arange(1, len(smooth) + 1), smooth, **style)
        accuracies.plot(list(run.accuracies), [100 * a for a in run.accuracies.values()], **style)
        if run.flips:
            flips.plot(list(run.flips), [100 * flip for flip in run.flips.values()], "o-", ms=4, **style)
    losses.set(title="Training loss (running mean)", xlabel="step")
    accuracies.set(title="Test accuracy, %", xlabel="step", ylim=(86, 100.3))
    flips.set(title="Flip rate: mask entries changed by a refresh, %", xlabel="step", yscale="log")
    flips.yaxis.set_major_formatter("{x:g}")
    for axes in (losses, accuracies, flips):
        axes.grid(alpha=0.25, lw=0.6)
        axes.legend(frameon=False)

    pictures = bottom.subplots(1, len(runs))
    kernel_of = {run.pattern: np.asarray(run.state.params[PICTURED]["kernel"])[1, 1, :CORNER, :CORNER] for run in runs}
    bottom.suptitle(
        f"Weights of {PICTURED} at the centre of its 3 x 3 window, first {CORNER} of 64 input and output channels. "
        "White: pruned. Red: a group along W$^T$ with more than n nonzeros.",
        fontsize=9.5,
    )
    colours = LinearSegmentedColormap.from_list("signed", ["#1e3a8a", "#a5b8e8", "#d4d4d4", "#f3c08b", "#9a3412"])
    for axes, run, result in zip(pictures, runs, checks, strict=True):
        n, m, kernel = result["n"], result["m"], kernel_of[run.pattern]
        reach = np.quantile(np.abs(kernel[kernel != 0]), 0.95)
        axes.imshow(np.where(kernel == 0, np.nan, kernel), cmap=colours, vmin=-reach, vmax=reach)
        edges = np.arange(0, CORNER + 1, m) - 0.5
        if run.pattern:
            axes.hlines(edges, -0.5, CORNER - 0.5, color="black", lw=0.9)
            axes.vlines(edges, -0.5, CORNER - 0.5, color="black", lw=0.9)
            for row in range(CORNER):
                for start in range(0, CORNER, m):
                    if np.count_nonzero(kernel[row, start : start + m]) > n:
                        axes.add_patch(
                            Rectangle((start - 0.42, row - 0.42), m - 0.16, 0.84, fill=False, ec="#dc2626", lw=1.3)
                        )
        held = ["W" * (result["forward"] <= n), "W$^T$" * (result["backward"] <= n)]
        claim = " and ".join(filter(None, held))
        axes.set_title(
            f"{run.name}: {f'{n}:{m} along {claim}' if run.pattern else 'no pattern'}", color=COLOURS[run.pattern]
        )
        axes.set(xticks=[], yticks=[], xlabel="output channels: groups of W$^T$")
        axes.spines[:].set_visible(False)
    pictures[0].set_ylabel("input channels: groups of W")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, facecolor="white")
    plt.close(figure)


def running_mean(values: np.ndarray, decay: float = 0.93) -> np.ndarray:
    """Running mean, without the bias to its start."""
    means, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = decay * total + (1 - decay) * value, decay * weight + (1 - decay)
        means.append(total / weight)
    return np.array(means)


def main() -> int:
    """Trains, verifies, prints and draws; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=480, help="training steps of each network (default 480)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and the batches (default 0)")
    parser.add_argument("--out", type=Path, default=Path("figures/quickstart.png"), help="where the figure goes")
    args = parser.parse_args()
    if args.steps < 1:
        parser.error("--steps must be at least 1")
    console = Console()
    start = time.perf_counter()
    runs = train(args.steps, args.seed, console)
    checks = [check(run) for run in runs]
    console.print("\n[bold]print(nm.verify(params, rules))[/bold] of the 4:8-T network:")
    console.print(f"{checks[-1]['report']}\n", highlight=False, soft_wrap=True)
    print_table(runs, checks, console)
    draw(runs, checks, args.out)
    console.print(f"Figure: {args.out}. {time.perf_counter() - start:.0f} s.")
    broken = [run.name for run, result in zip(runs, checks, strict=True) if not result["ok"]]
    if broken:
        console.print(f"[bold red]The pattern does not hold: {', '.join(broken)}[/bold red]")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
