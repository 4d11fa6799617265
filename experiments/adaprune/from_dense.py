"""Pretrained networks made sparse without training: AdaPrune, the bias fix and batch-norm tuning, on five networks.

Hubara et al., "Accelerated Sparse Neural Training: A Provable and Efficient Method to Find N:M Transposable Masks"
(NeurIPS 2021), Section 5 and A.1. Their Table A.1 has AdaPrune from dense (ResNet-50: 76.1 % dense, 67.4 % bias fix,
74.4 % AdaPrune, 74.8 % with batch-norm tuning), Table A.2 from 4:8 to 2:4 and 1:2 (76.5 -> 76.4 and 75.1 %), and
Fig. 5b from unstructured to N:M layer by layer. The figures here are of smaller networks: compare them with the rows
"dense" and "dense + BNT" above them, which are of the same test data.

    NM_JAX_DATA=<folder> python -m experiments.adaprune.from_dense [--networks minilm,...] [--quick] [--report]

Masks are by magnitude and optimal; the first and the last layer stay dense (in MiniLM only the embedding does).
Calibrated on training data, judged on test data; mean and standard deviation over three calibration samples. Each part
writes `results/adaprune_<part>.json` when it is complete; `--report` prints the tables of those that are there, and
draws the figures. On 2 cores about 10 minutes a network, and half an hour for those that are trained sparse first.
"""

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import scipy.linalg
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import nm_jax as nm
from experiments.data import packed
from experiments.harness import RESULTS, core_count, device_name, results_stem
from experiments.networks import NETWORKS, Network, row_mask

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PATTERNS = ("2:4", "4:8", "2:4-T", "4:8-T", "1:2")
SEEDS = (0, 1, 2)
# Examples to calibrate on, and to test on where there are so many.
CALIBRATION = {"minilm": 320, "squeezenet": 250}
IMAGES, TEST, QUICK = 1000, 5000, 500
SPARSE = "resnet20-cifar10"  # the network of Table A.2 and Fig. 5b
STEPS, RATE, TRAIN_BATCH = 400, 0.02, 128  # of sparse training, from the pretrained weights
TRAININGS = 5  # networks that are trained for that
UNIFORM, OVERALL = "US-0.8", "80 % overall"  # unstructured: the same in every layer, or by one threshold for all
PERCENTS = (0.1, 1.0, 5.0, 10.0, 20.0, 50.0)
EXCESS = 0.01  # that a reconstruction may have over the exact minimiser
LARGE = 384  # K from which the speed of a reconstruction is compared with that of Adam


class Study:
    """One network, its calibration samples, and what they say of its layers."""

    def __init__(self, network: Network, variables: dict, quick: bool, tests: int):
        self.network, self.variables, self.params = network, variables, variables["params"]
        count = CALIBRATION.get(network.name, IMAGES)
        self.count, self.limit = count // 5 if quick else count, tests
        self.samples = [network.calibration(self.count, seed) for seed in (SEEDS[:1] if quick else SEEDS)]
        self.tunable = "batch_stats" in variables
        self.apply = network.apply(variables)

    @functools.cached_property
    def grams(self) -> list:
        """The Gram matrices of every sample."""
        masked = row_mask if self.network.name == "minilm" else None
        leaves = self.plan("2:4")
        return [nm.gram(self.apply, self.params, sample, leaves, masked) for sample in self.samples]

    def plan(self, pattern: str) -> nm.Plan:
        """First and last layer dense; MiniLM's last layer is inside the encoder, and as the others."""
        last = pattern if self.network.name == "minilm" else None
        return nm.plan(self.apply, self.params, *self.samples[0][0], pattern=pattern, last=last)

    def evaluate(self, params: Any, stats: Any = None) -> float:
        """The metric with other weights, in percent."""
        others = {} if stats is None else {"batch_stats": stats}
        return self.network.evaluate(self.variables | {"params": params} | others, self.limit)

    def evaluate_tuned(self, params: Any, sample: list) -> float:
        """The same, after batch-norm tuning."""
        update = functools.partial(self._updated, params)
        return self.evaluate(params, nm.tune_batch_norm(update, self.variables["batch_stats"], sample))

    @functools.cached_property
    def _updated(self) -> Callable:
        def updated(params, stats, images):
            variables = {"params": params, "batch_stats": stats}
            return self.network.module.apply(variables, images, train=True, mutable=["batch_stats"])[1]["batch_stats"]

        return jax.jit(updated)

    def methods(self, masks: Any, rules: Any) -> dict[str, Callable[[int], Any]]:
        """The weights that each method makes of masks, given the number of the sample."""
        leaves = {row.leaf.path: row.leaf for row in nm.verify(masks, rules).rows}

        def absorb(keys, w, mask):
            leaf = leaves.get("/".join(key.key for key in keys))
            return w if mask is None else nm.absorb_mean(w, mask, leaf.pattern, leaf.axes)

        return {
            "none": lambda _: nm.apply_masks(self.params, masks),
            "bias fix": lambda _: jax.tree_util.tree_map_with_path(absorb, self.params, masks),
            "AdaPrune": lambda k: nm.reconstruct_layers(self.params, masks, self.grams[k])[0],
        }

    def rows(self, setting: str, masks: Any, rules: Any) -> Iterator[dict]:
        """Every method, alone and with batch-norm tuning."""
        for method, weights in self.methods(masks, rules).items():
            fixed = method != "AdaPrune"  # the same for all samples
            made = [weights(k) for k in range(1 if fixed else len(self.samples))]
            for params in made:
                self.check(params, masks, rules)
            yield {"setting": setting, "method": method, "values": [self.evaluate(params) for params in made]}
            if self.tunable:
                made = made * len(self.samples) if fixed else made
                values = [self.evaluate_tuned(p, s) for p, s in zip(made, self.samples, strict=True)]
                yield {"setting": setting, "method": f"{method} + BNT", "values": values}

    def check(self, params: Any, masks: Any, rules: Any) -> None:
        """Every pattern holds; what has no mask, and is not the bias of what has one, is the same bit for bit."""
        verified = nm.verify(params, rules)
        if not verified.ok:
            raise RuntimeError(f"{self.network.name} breaks its pattern\n{verified}")
        old, masked = by_path(self.params), by_path(masks)
        free = masked.keys() | {path.replace("kernel", "bias") for path in masked}
        changed = [path for path, w in by_path(params).items() if path not in free and not np.array_equal(w, old[path])]
        if changed:
            raise RuntimeError(f"{self.network.name}: {', '.join(changed)} changed, which should stay as they are")

    def baseline(self, name: str) -> list[dict]:
        """The rows of the weights as they are."""
        rows = [{"setting": name, "method": "none", "values": [self.evaluate(self.params)]}]
        if self.tunable:
            values = [self.evaluate_tuned(self.params, sample) for sample in self.samples]
            rows.append({"setting": name, "method": "none + BNT", "values": values})
        return rows

    def record(self, rows: list[dict], **more: Any) -> dict:
        """What is written to the file."""
        return {
            "network": self.network.title,
            "metric": self.network.metric,
            "calibration": self.count,
            "samples": len(self.samples),
            "test": min(self.limit, self.network.tests),
            "device": device_name(),
            "cores": core_count(),
            "jax": jax.__version__,
            "rows": rows,
        } | more


def from_dense(network: Network, quick: bool, tests: int, advance: Callable[[], None]) -> dict:
    """Table A.1: every pattern and method from the dense weights; and the layers one by one."""
    study = Study(network, network.variables(), quick, tests)
    rows, layers = study.baseline("dense"), {}
    for pattern in PATTERNS:
        rules = study.plan(pattern)
        rows += study.rows(pattern, nm.compute_masks(study.params, rules), rules)
        if pattern in ("2:4", "2:4-T"):
            values = []
            for gram in study.grams:
                masks = nm.compute_masks(study.params, rules, scores=nm.score_tree(nm.obc, study.params, gram))
                params = nm.reconstruct_layers(study.params, masks, gram)[0]
                study.check(params, masks, rules)
                values.append(study.evaluate(params))
            rows.append({"setting": pattern, "method": "AdaPrune, OBC masks", "values": values})
            layers[pattern] = layer_errors(study, rules)
        advance()
    return study.record(rows, layers=layers, solver=against_exact(study))


def layer_errors(study: Study, rules: Any) -> dict[str, list[float | None]]:
    """[before, after, before held out, after held out] of every layer; held out is another sample."""
    masks = nm.compute_masks(study.params, rules)
    _, report = nm.reconstruct_layers(study.params, masks, study.grams[0], held_out=study.grams[-1])
    return {r.path: [r.before, r.after, r.held_out_before, r.held_out_after] for r in report.layers}


def against_exact(study: Study) -> list[dict]:
    """Every layer: the excess over the exact minimiser in double precision; at 2:4 error and time of Adam as well."""
    weights, grams, others = by_path(study.params), by_path(study.grams[0]), by_path(study.grams[-1])
    rows, compared = [], set()
    for pattern in ("2:4", "2:4-T"):
        for path, mask in by_path(nm.compute_masks(study.params, study.plan(pattern))).items():
            w, gram, bias = weights[path], grams[path], weights.get(path.replace("kernel", "bias"))
            centred = bias is not None
            judge = functools.partial(nm.output_error, w, centred=centred)
            fast, seconds = timed(lambda w=w, g=gram, s=mask, b=bias: nm.reconstruct(w, g, s, bias=b))
            optimum = judge(exact_minimiser(w, gram, mask, centred), gram)
            row = {"pattern": pattern, "path": path, "K": gram.h.shape[-1], "iterations": int(fast.iterations)}
            row |= {"excess": float(judge(fast.weight, gram) / optimum) - 1, "seconds": seconds}
            row |= {"before": float(fast.before), "after": float(fast.after)}
            if row["K"] >= LARGE and w.shape not in compared:
                compared.add(w.shape)
                slow, row["adam_seconds"] = timed(lambda w=w, g=gram, s=mask: nm.reconstruct(w, g, s, method="adam"))
                row |= {"held_out": float(judge(fast.weight, others[path]))}
                row |= {"adam_held_out": float(judge(slow.weight, others[path]))}
            rows.append(row)
    return rows


def by_path(tree: Any) -> dict[str, Any]:
    """The leaves, Gram matrices or arrays, by '/'-joined keys."""
    nodes = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: isinstance(node, nm.Gram))[0]
    return {"/".join(key.key for key in keys): leaf for keys, leaf in nodes}


def exact_minimiser(w: jax.Array, gram: nm.Gram, mask: jax.Array, centred: bool) -> jax.Array:
    """The problem of `nm.reconstruct`, output by output by Cholesky factorisation in double precision."""
    h, total, rows = (np.asarray(x[0], np.float64) for x in (gram.h, gram.total, gram.rows))
    dense = np.asarray(w, np.float64).reshape(len(h), -1)
    kept = np.asarray(mask).reshape(dense.shape)
    pull = np.clip(0.3 * len(h) / rows, 1e-3, 0.3) * np.diag(h).mean()
    h = h - np.outer(total, total) / rows * centred + pull * np.eye(len(h))
    target, new = h @ dense, np.zeros_like(dense)
    for k in range(dense.shape[1]):
        support = np.flatnonzero(kept[:, k])
        new[support, k] = scipy.linalg.solve(h[np.ix_(support, support)], target[support, k], assume_a="pos")
    return jnp.asarray(new.reshape(w.shape), jnp.float32)


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
    """The result and the seconds of the second run, which does not compile."""
    jax.block_until_ready(run())
    start = time.perf_counter()
    return jax.block_until_ready(run()), time.perf_counter() - start


# -------------------------------------------------------------------------------------------- from sparse networks


def trained_on(network: Network, rules: Any, steps: int, advance: Callable[[], None]) -> dict:
    """The pretrained network trained on for some steps, sparse where the rules say so; `None`: dense."""
    variables = network.variables()
    params, stats = variables["params"], variables["batch_stats"]
    labels = packed.labels(network.train)
    tx = optax.sgd(optax.cosine_decay_schedule(RATE, steps), momentum=0.9)
    if rules is not None:
        tx = nm.sparse_training(tx, rules)
    state = tx.init(params)

    @jax.jit
    def step(params, stats, state, images, labels):
        def loss(params):
            variables = {"params": params, "batch_stats": stats}
            logits, new = network.module.apply(variables, images, train=True, mutable=["batch_stats"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), new["batch_stats"]

        grads, new_stats = jax.grad(loss, has_aux=True)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), new_stats, state

    draw = np.random.default_rng(0)
    for _ in range(steps):
        chosen = draw.choice(len(labels), TRAIN_BATCH, replace=False)
        images = network.inputs(packed.images(network.train, chosen))
        params, stats, state = step(params, stats, state, jnp.asarray(images), jnp.asarray(labels[chosen]))
        advance()
    return {"params": params, "batch_stats": stats}


def one_threshold(params: Any, rules: Any, sparsity: float) -> list[tuple[str, str]]:
    """Unstructured patterns whose sparsities differ: those that one threshold for all layers gives them."""
    dense = by_path(params)
    weights = {path: np.abs(dense[path]) for path in by_path(nm.compute_masks(params, rules))}
    threshold = np.quantile(np.concatenate([w.ravel() for w in weights.values()]), sparsity)
    return [(f"^{path}$", f"US-{min(np.mean(w < threshold), 0.98):.2f}") for path, w in weights.items()]


def from_sparse(quick: bool, tests: int, advance: Callable[[], None]) -> dict:
    """Table A.2: 4:8 to 2:4 and 1:2; and Fig. 5b: unstructured to n:8, layer by layer."""
    network, steps = NETWORKS[SPARSE], 20 if quick else STEPS
    pretrained = Study(network, network.variables(), quick, tests)

    def study(rules: Any) -> Study:
        return Study(network, trained_on(network, rules, steps, advance), quick, tests)

    rows = pretrained.baseline("dense, as pretrained") + study(None).baseline("dense")
    for suffix in ("", "-T"):
        start = study(pretrained.plan(f"4:8{suffix}"))
        rows += start.baseline(f"4:8{suffix}")
        for target in (f"2:4{suffix}", f"1:2{suffix}"):
            rules = start.plan(target)
            violations = nm.pattern_violations(start.params, rules)
            for row in start.rows(f"4:8{suffix} to {target}", nm.fit_masks(start.params, rules), rules):
                rows.append(row | _mean_violations(violations))
    uniform = pretrained.plan(UNIFORM)
    unstructured = {UNIFORM: uniform, OVERALL: one_threshold(pretrained.params, uniform, 0.8)}
    for name, pattern in unstructured.items():
        start = study(pattern)
        rows += start.baseline(name)
        for percent in PERCENTS:
            rules = nm.choose_patterns(start.params, start.plan("4:8"), percent)
            masks = nm.fit_masks(start.params, rules)
            kept = jax.tree.leaves(masks)
            sparsity = 1 - sum(int(mask.sum()) for mask in kept) / sum(mask.size for mask in kept)
            more = _mean_violations(nm.pattern_violations(start.params, rules))
            more |= {"start": name, "percent": percent, "sparsity": sparsity}
            more["patterns"] = {path.strip("^$"): str(pattern) for path, pattern, _ in rules}
            rows += [row | more for row in start.rows(f"{name}, {percent:g} %", masks, rules)]
    return pretrained.record(rows, steps=steps, rate=RATE, batch=TRAIN_BATCH)


def _mean_violations(violations: list[nm.Violations]) -> dict[str, float]:
    return {name: float(np.mean([getattr(v, name) for v in violations])) for name in ("tiles", "weights")}


# ------------------------------------------------------------------------------------------------------- reporting


def print_rows(console: Console, record: dict) -> None:
    """One line per setting, one column per method."""
    methods = list(dict.fromkeys(row["method"] for row in record["rows"]))
    table = Table(title=f"{record['network']}: {record['metric']} in %", box=None, title_justify="left")
    table.add_column("")
    for method in methods:
        table.add_column(method, justify="right")
    for setting in dict.fromkeys(row["setting"] for row in record["rows"]):
        found = {row["method"]: row["values"] for row in record["rows"] if row["setting"] == setting}
        table.add_row(setting, *(summary(found[m]) if m in found else "" for m in methods))
    console.print(table)
    note = f"{record['samples']} samples of {record['calibration']} training examples, {record['test']} test examples"
    console.print(note + "; BNT: batch-norm tuning", style="dim", highlight=False)


def summary(values: list[float]) -> str:
    """Mean and, of several, standard deviation."""
    spread = f" ±{np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
    return f"{np.mean(values):.2f}{spread}"


def print_solver(console: Console, record: dict) -> bool:
    """How near the reconstruction is to the exact minimiser, and how much faster than Adam; false when too far."""
    worst = max(record["solver"], key=lambda row: row["excess"])
    grown = sum(row["after"] > row["before"] for row in record["solver"])
    console.print(
        f"{len(record['solver'])} layers at 2:4 and 2:4-T: at most {100 * worst['excess']:.2f} % above the exact "
        f"minimiser ({worst['path']}, {worst['pattern']}), {grown} with a larger error than before"
    )
    large = [row for row in record["solver"] if "adam_seconds" in row]
    if large:
        ratios = [row["adam_seconds"] / row["seconds"] for row in large]
        errors = [row["adam_held_out"] / row["held_out"] for row in large]
        console.print(
            f"{len(large)} shapes with K >= {LARGE}: 1000 iterations of Adam take {np.median(ratios):.0f} times as "
            f"long ({min(ratios):.0f} to {max(ratios):.0f}), and leave {np.median(errors):.2f} times the held-out "
            f"error ({min(errors):.2f} to {max(errors):.2f})"
        )
    return grown == 0 and worst["excess"] <= EXCESS


def draw_probability(path: Path) -> None:
    """Fig. 5a: the probability that a group of a half-empty matrix has n:m, over the share of zeros that this asks."""
    figure, axis = plt.subplots(figsize=(5, 3.5), layout="constrained")
    for m in (4, 8, 16, 32, 64):
        zeros = range(m + 1)
        fits = [1 - nm.violation_probability(m - k, m, 0.5) for k in zeros]
        axis.plot([k / m for k in zeros], fits, marker=".", label=f"m = {m}")
    axis.set(xlabel="zeros asked for, (m - n) / m", ylabel="probability", title="Eq. 4 at 50 % unstructured sparsity")
    axis.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_violations(record: dict, path: Path) -> None:
    """Fig. 5b: accuracy over the allowed probability of violating the pattern."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
    for axis, start in zip(axes, (UNIFORM, OVERALL), strict=True):
        rows = [row for row in record["rows"] if row.get("start") == start]
        for method in dict.fromkeys(row["method"] for row in rows):
            points = [row for row in rows if row["method"] == method]
            means, spreads = zip(*((np.mean(r["values"]), np.std(r["values"])) for r in points), strict=True)
            axis.errorbar([r["percent"] for r in points], means, spreads, marker="o", capsize=2, label=method)
        base = next(row for row in record["rows"] if row["setting"] == start)["values"][0]
        axis.axhline(base, color="grey", linestyle="--", label=start)
        axis.set(
            xscale="log", xlabel="allowed probability of a violation, %\nzeros", title=f"{start}, to n:8 layer by layer"
        )
        axis.set_xticks([row["percent"] for row in points], [f"{r['percent']:g}\n{r['sparsity']:.0%}" for r in points])
        axis.minorticks_off()
        axis.legend(fontsize=8)
    axes[0].set(ylabel=f"{record['network']}, test accuracy, %")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def report(console: Console, out: Path, parts: Iterable[str]) -> bool:
    """What has been run to its end; false if a reconstruction is not what it should be."""
    good = True
    draw_probability(results_stem(out, "paper/figure_5").with_suffix(".png"))
    for part in parts:
        path = results_stem(out, result_name(part)).with_suffix(".json")
        if path.exists():
            record = json.loads(path.read_text())
            print_rows(console, record)
            if "solver" in record:
                good &= print_solver(console, record)
            if part == "sparse":
                draw_violations(record, path.with_suffix(".png"))
            console.print()
    return good


def result_name(part: str) -> str:
    """The folder of the results of a part."""
    return "adaprune/from_sparse" if part == "sparse" else f"adaprune/from_dense/{part}"


def main() -> None:
    """Runs the parts that are asked for."""
    parts = [*NETWORKS, "sparse"]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", default=",".join(parts), help=f"comma-separated parts of: {', '.join(parts)}")
    parser.add_argument("--quick", action="store_true", help="one small sample, few test examples; to another folder")
    parser.add_argument("--test", type=int, help=f"test examples at the most (default {TEST}, with --quick {QUICK})")
    parser.add_argument("--report", action="store_true", help="only print what is there")
    parser.add_argument("--out", type=Path, help="folder of the results")
    args = parser.parse_args()
    out = args.out or (RESULTS / "quick" if args.quick else RESULTS)
    out.mkdir(parents=True, exist_ok=True)
    console = Console(width=None if sys.stdout.isatty() else 160)
    if unknown := set(args.networks.split(",")) - set(parts):
        raise SystemExit(f"unknown parts {sorted(unknown)}; there are {', '.join(parts)}")
    tests = args.test or (QUICK if args.quick else TEST)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    for part in () if args.report else args.networks.split(","):
        start = time.perf_counter()
        with Progress(*columns, console=console) as progress:
            steps = TRAININGS * (20 if args.quick else STEPS) if part == "sparse" else len(PATTERNS)
            task = progress.add_task(part, total=steps)
            advance = functools.partial(progress.advance, task)
            record = (
                from_sparse(args.quick, tests, advance)
                if part == "sparse"
                else from_dense(NETWORKS[part], args.quick, tests, advance)
            )
        record["minutes"] = round((time.perf_counter() - start) / 60, 1)
        results_stem(out, result_name(part)).with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    if not report(console, out, args.networks.split(",")):
        raise SystemExit(f"a layer grew, or is more than {100 * EXCESS:.0f} % above the exact minimiser")


if __name__ == "__main__":
    main()
