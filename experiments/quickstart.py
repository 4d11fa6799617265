"""One small convolutional network, trained from scratch dense, 2:4, 2:4-T and 4:8-T on real digits.

Hubara et al., "Accelerated Sparse Neural Training: A Provable and Efficient Method to Find N:M Transposable Masks"
(NeurIPS 2021), Section 4: train sparse from scratch, refresh the masks from the dense weights every 40 updates. A
transposable mask (-T) is n:m along W, for the forward pass, *and* along W^T, for the backward pass.

Expected: four networks with about the same test accuracy (differences below one point are noise: there are 719 test
images); 2:4 verified along W but not along W^T, the -T patterns along both; flip rates that fall as training settles.
The figure goes to the folder `figures`. Exits with status 1 when a pattern does not hold.

Paper: Section 4
Time: 1 minute on 2 cores
Data: none
"""

import argparse
import functools
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from rich.progress import TextColumn

import nm_jax as nm
from experiments.data import batches, digits
from experiments.harness import Experiment, Run, Table
from experiments.networks import DigitsNet
from experiments.train import Task, Training, classification

PATTERNS = (None, "2:4", "2:4-T", "4:8-T")  # None: dense
COLOURS = {"dense": "#6b7280", "2:4": "#d97706", "2:4-T": "#2563eb", "4:8-T": "#059669"}
BATCH = 128
EVALUATE_EVERY = 20
REFRESH_EVERY = 40  # the paper's
PICTURED = "Conv_2"  # layer whose masks the figure shows
CORNER = 24  # rows and columns of it


# ------------------------------------------------------------------------------------------------------------ training


def rules(pattern: str) -> list[tuple[str, str | None]]:
    """The head stays dense, as in the paper; every other kernel gets the pattern if it can have it."""
    return [("head", None), ("kernel", pattern)]


def optimiser(pattern: str | None, steps: int) -> optax.GradientTransformation:
    """Adam with a cosine schedule; sparse where a pattern is given."""
    tx = optax.adam(optax.cosine_decay_schedule(2e-3, steps, alpha=0.05))
    if pattern is not None:
        tx = nm.recipes.paper(tx, rules(pattern))  # the one line that makes training sparse
    return tx


def digits_task(steps: int, seed: int, batch: int, tests: int | None) -> Task:
    """The same batches for every network: what else the machine does, it does to all of them."""
    train_images, test_images, train_labels, test_labels = digits.load()
    test_images, test_labels = test_images[:tests], test_labels[:tests]
    network = DigitsNet()
    chosen = batches.drawn(len(train_images), batch, steps, seed)
    logits = jax.jit(network.apply)

    def accuracy(params, extra):
        predicted = logits({"params": params, **extra}, test_images).argmax(axis=-1)
        return {"accuracy": float((predicted == test_labels).mean())}

    start = functools.partial(network.init, images=jnp.zeros((1, *digits.SHAPE)))
    return classification(network, start, lambda k: (train_images[chosen[k]], train_labels[chosen[k]]), accuracy)


class Network:
    """The training of one network, and what is measured on the way."""

    def __init__(self, task: Task, pattern: str | None, steps: int, seed: int):
        self.pattern, self.name = pattern, pattern or "dense"
        self.training = Training(task, optimiser(pattern, steps), steps, seed=seed)
        self.evaluate = task.evaluate or (lambda params, extra: {})
        self.losses: list[jax.Array] = []
        self.seconds: list[float] = []
        self.accuracies: list[tuple[int, float]] = []
        self.flips: list[tuple[int, float]] = []

    def step(self) -> None:
        """Trains on one batch, evaluates now and then, and sees what a refresh changed."""
        start = time.perf_counter()
        loss = self.training.step()
        jax.block_until_ready((self.training.state, loss))
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(loss)
        number, state = self.training.number, self.training.state
        if (number - 1) % EVALUATE_EVERY == 0 or number == self.training.steps:
            self.accuracies.append((number, self.evaluate(state.params, state.extra)["accuracy"]))
        if self.pattern and number % REFRESH_EVERY == 0:
            # Refreshed just now. All sparse weights count alike, in large layers and in small ones.
            sizes = [np.prod(row.leaf.shape) for row in nm.verify(state.params, rules(self.pattern)).rows]
            flips = nm.refresh_stats(state.opt_state).flip_rate
            self.flips.append((number, float(np.average(flips, weights=sizes))))


def train(run: Run, steps: int) -> list[Network]:
    """Trains all networks side by side."""
    batch, tests = (8, 32) if run.quick else (BATCH, None)
    task = digits_task(steps, run.args.seed, batch, tests)
    networks = [Network(task, p, steps, run.args.seed) for p in (PATTERNS[::3] if run.quick else PATTERNS)]
    text = TextColumn("loss {task.fields[loss]:.4f}  test accuracy {task.fields[accuracy]:.1%}")
    with run.progress(text) as progress:
        bars = [progress.add_task(f"{n.name:<5}", total=steps, loss=float("nan"), accuracy=0.0) for n in networks]
        for _ in range(steps):
            for network, bar in zip(networks, bars, strict=True):
                network.step()
                progress.update(bar, advance=1, accuracy=network.accuracies[-1][1])
                if network.accuracies[-1][0] == network.training.number:
                    progress.update(bar, loss=float(network.losses[-1]))
    return networks


# -------------------------------------------------------------------------------------------------------- verification


def kernels(tree: Any, pattern: str) -> dict[str, np.ndarray]:
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


def judge(network: Network) -> dict:
    """Measures a trained network: groups along W and W^T, by slicing and by `nm.verify`, and retained magnitude."""
    pattern = network.pattern or "2:4"  # the dense network is held against 2:4
    n, m = (int(number) for number in pattern.removesuffix("-T").split(":"))
    state = network.training.state
    report = nm.verify(state.params, rules(pattern))
    sparse = kernels(state.params, pattern)
    # Flax kernels end in (input, output): the forward pass contracts the one, the backward pass the other.
    along = {path: (fullest_group(k, m, axis=-2), fullest_group(k, m, axis=-1)) for path, k in sparse.items()}
    for path, counts in along.items():
        if counts != (report[path].contraction, report[path].output):
            raise SystemExit(f"{path}: NumPy counts {counts} in the fullest group, nm.verify says {report[path]}")
    forward, backward = (max(counts) for counts in zip(*along.values(), strict=True))
    result = {
        "name": network.name,
        "n": n,
        "m": m,
        "forward": forward,
        "backward": backward,
        "ok": True,
        "losses": [float(loss) for loss in network.losses],
        "seconds": network.seconds,
        "accuracies": network.accuracies,
        "flips": network.flips,
        "corner": np.asarray(state.params[PICTURED]["kernel"])[1, 1, :CORNER, :CORNER].tolist(),
    }
    if network.pattern:
        both = network.pattern.endswith("-T")
        result["ok"] = report.ok and forward <= n and (backward <= n or not both)
        dense = kernels(nm.dense_params(state.opt_state, state.params), pattern)
        kept = sum(np.abs(dense[path][sparse[path] != 0]).sum() for path in sparse)
        largest = [np.sort(np.abs(dense[p]), axis=None)[::-1][: np.count_nonzero(sparse[p])] for p in sparse]
        result["retained"] = float(kept / sum(np.abs(d).sum() for d in dense.values()))
        result["of_unstructured"] = float(kept / sum(values.sum() for values in largest))
    return result


def measure(run: Run) -> dict:
    """Trains and verifies."""
    steps = REFRESH_EVERY + 1 if run.quick else run.args.steps
    networks = train(run, steps)
    last = networks[-1]
    run.console.print(f"\n[bold]print(nm.verify(params, rules))[/bold] of the {last.name} network:")
    report = nm.verify(last.training.state.params, rules(last.name))
    run.console.print(f"{report}\n", highlight=False, soft_wrap=True)
    return {"steps": steps, "seed": run.args.seed, "networks": [judge(network) for network in networks]}


# -------------------------------------------------------------------------------------------------------------- output


def timing(seconds: list[float]) -> tuple[float, float]:
    """Seconds of a step: the median, and the mean over whole refresh periods. The first period, which has the
    compilation, does not count."""
    periods = len(seconds) // REFRESH_EVERY
    counted = seconds[REFRESH_EVERY : periods * REFRESH_EVERY] if periods > 1 else seconds[-5:]
    return float(np.median(counted)), float(np.mean(counted))


def tables(result: dict) -> list[Table]:
    """All networks, and what they cost."""
    columns = ("test accuracy", "along W", "along W^T", "retained", "of US", "last flips", "step, median", "mean")
    first, *_ = result["networks"]
    base, rows = timing(first["seconds"]), []
    for network in result["networks"]:
        sparse, pairs = "retained" in network, zip(timing(network["seconds"]), base, strict=True)
        times = [f"{own / dense:.2f}x" if sparse else f"{1e3 * own:.1f} ms" for own, dense in pairs]
        along = [
            f"{'yes' if most <= network['n'] else 'no'}, {most}/{network['m']}"
            for most in (network["forward"], network["backward"])
        ]
        kept = [f"{network[name]:.1%}" if sparse else "-" for name in ("retained", "of_unstructured")]
        flips = f"{network['flips'][-1][1]:.2%}" if network["flips"] else "-"
        rows.append((network["name"], f"{network['accuracies'][-1][1]:.1%}", *along, *kept, flips, *times))
    notes = (
        "along W, W^T: most nonzeros in any group of m, by NumPy and by nm.verify (dense: against 2:4). 2:4 promises "
        "nothing along W^T. retained: share of the l1 norm of the dense weights that the masks keep, also relative to "
        "unstructured masks (US). last flips: mask entries that the last refresh changed. step: time relative to "
        "dense, without and with refreshes. All networks multiply dense arrays here; this is what masks cost, and "
        "sparse kernels are what turns them into speed."
    )
    return [Table("networks", ("network", *columns), rows, f"{result['steps']} steps", notes)]


def problems(result: dict) -> list[str]:
    """Networks without their pattern."""
    return [f"The pattern does not hold: {network['name']}" for network in result["networks"] if not network["ok"]]


def draw(result: dict) -> Figure:
    """Training curves, flip rates, and a corner of one layer's masks."""
    networks = result["networks"]
    figure = Figure(figsize=(12.5, 8.2), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 1.12))
    losses, accuracies, flips = top.subplots(1, 3)
    for network in networks:
        style = {"color": COLOURS[network["name"]], "label": network["name"], "lw": 1.6}
        smooth = running_mean(network["losses"])
        losses.semilogy(np.arange(1, len(smooth) + 1), smooth, **style)
        accuracies.plot(*_percent(network["accuracies"]), **style)
        if network["flips"]:
            flips.plot(*_percent(network["flips"]), "o-", ms=4, **style)
    losses.set(title="Training loss (running mean)", xlabel="step")
    accuracies.set(title="Test accuracy, %", xlabel="step", ylim=(86, 100.3))
    flips.set(title="Flip rate: mask entries changed by a refresh, %", xlabel="step", yscale="log")
    flips.yaxis.set_major_formatter("{x:g}")
    for axes in (losses, accuracies, flips):
        axes.grid(alpha=0.25, lw=0.6)
        axes.legend(frameon=False)
    bottom.suptitle(
        f"Weights of {PICTURED} at the centre of its 3 x 3 window, first {CORNER} of 64 input and output channels. "
        "White: pruned. Red: a group along W$^T$ with more than n nonzeros.",
        fontsize=9.5,
    )
    pictures = bottom.subplots(1, len(networks))
    for axes, network in zip(pictures, networks, strict=True):
        draw_corner(axes, network)
    pictures[0].set_ylabel("input channels: groups of W")
    return figure


def draw_corner(axes: Any, network: dict) -> None:
    """The weights of the corner, its tiles, and the groups along W^T that are too full."""
    colours = LinearSegmentedColormap.from_list("signed", ["#1e3a8a", "#a5b8e8", "#d4d4d4", "#f3c08b", "#9a3412"])
    n, m, name, kernel = network["n"], network["m"], network["name"], np.array(network["corner"])
    reach = np.quantile(np.abs(kernel[kernel != 0]), 0.95)
    axes.imshow(np.where(kernel == 0, np.nan, kernel), cmap=colours, vmin=-reach, vmax=reach)
    sparse = name != "dense"
    if sparse:
        edges = np.arange(0, CORNER + 1, m) - 0.5
        axes.hlines(edges, -0.5, CORNER - 0.5, color="black", lw=0.9)
        axes.vlines(edges, -0.5, CORNER - 0.5, color="black", lw=0.9)
        for row in range(CORNER):
            for start in range(0, CORNER, m):
                if np.count_nonzero(kernel[row, start : start + m]) > n:
                    corner = (start - 0.42, row - 0.42)
                    axes.add_patch(Rectangle(corner, m - 0.16, 0.84, fill=False, ec="#dc2626", lw=1.3))
    held = " and ".join(["W"] * (network["forward"] <= n) + ["W$^T$"] * (network["backward"] <= n))
    title = f"{name}: {f'{n}:{m} along {held}' if sparse else 'no pattern'}"
    axes.set_title(title, color=COLOURS[name])
    axes.set(xticks=[], yticks=[], xlabel="output channels: groups of W$^T$")
    axes.spines[:].set_visible(False)


def _percent(points: list) -> tuple[list, list]:
    return [step for step, _ in points], [100 * value for _, value in points]


def running_mean(values: list[float], decay: float = 0.93) -> np.ndarray:
    """Running mean, without the bias to its start."""
    means, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = decay * total + (1 - decay) * value, decay * weight + (1 - decay)
        means.append(total / weight)
    return np.array(means)


def options(parser: argparse.ArgumentParser) -> None:
    """How long, and from which seed."""
    parser.add_argument("--steps", type=_positive, default=480, help="training steps of each network (default 480)")
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights and the batches (default 0)")


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


EXPERIMENT = Experiment(measure, tables, draw, problems, options, folder=Path("figures"))
