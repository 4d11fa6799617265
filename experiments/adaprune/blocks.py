"""What a mask costs without training: permuted channels, swapped weights, and blocks of layers fitted together.

Hubara et al., "Accelerated Sparse Neural Training: A Provable and Efficient Method to Find N:M Transposable Masks"
(NeurIPS 2021), Section 5 and A.1, go layer by layer: their Table A.1 is `adaprune/from_dense` here, whose calibration
and test data these are. Compact networks break that way. Each row adds one thing to the one above it.

The network of inverted bottlenecks is trained here, on scikit-learn's digits, in a minute; its batch norms are folded
into its convolutions before it is pruned. Exits with status 1 when fitting blocks has made the error of a network's
outputs worse on inputs held out.

Paper: Table A.1, extended
Time: 5 minutes for the bottlenecks, half an hour and more for each pattern of the others, on 2 cores
Data: pretrained weights, CIFAR, STS-B (NM_JAX_DATA); none for the bottlenecks
"""

import argparse
import dataclasses
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import nm_jax as nm
from experiments.adaprune.study import SEEDS, Study, options, table, test_limit
from experiments.data import batches, digits
from experiments.harness import Experiment, Run, Table
from experiments.networks import NETWORKS, Network, row_mask
from experiments.networks.bottlenecks import Bottlenecks, fold
from experiments.train import classification, fit

TRAINING, QUICK_TRAINING = 300, 10  # steps, of the bottlenecks
METHODS = ("permutation", "swaps", "blocks")
BATCH = 25  # examples in a batch that blocks are fitted on


@dataclasses.dataclass(frozen=True)
class Digits(Network):
    """The bottlenecks, trained here and folded."""

    steps: int = TRAINING

    def calibration(self, count, seed):
        images = digits.load()[0]
        chosen = np.random.default_rng(seed).choice(len(images), min(count, len(images)), replace=False)
        return [(jnp.asarray(images[chosen]),)]

    def evaluate(self, variables, limit=None):
        images, labels = self._test_data
        predicted = self._forward(variables, jnp.asarray(images)).argmax(axis=-1)
        return 100 * float(np.mean(np.asarray(predicted) == labels))

    @property
    def _test_data(self):
        _, images, _, labels = digits.load()
        return images, labels


def trained(steps: int) -> dict:
    """The bottlenecks, trained and folded."""
    images, _, labels, _ = digits.load()
    chosen = batches.drawn(len(images), 64, steps, seed=0)
    module = Bottlenecks()
    start = functools.partial(module.init, x=jnp.zeros((1, *digits.SHAPE)))
    task = classification(module, start, lambda k: (images[chosen[k]], labels[chosen[k]]))
    state = fit(task, optax.adam(optax.cosine_decay_schedule(4e-3, steps)), steps)
    return fold({"params": state.params, **state.extra})


def network_of(part: str, quick: bool) -> Network:
    """One of the pretrained networks, or the one that is trained here."""
    if part != "bottlenecks":
        return NETWORKS[part]
    steps = QUICK_TRAINING if quick else TRAINING
    return Digits(
        name=part,
        title="Inverted bottlenecks, digits",
        metric="accuracy",
        expected=98.0,
        module=Bottlenecks(folded=True),
        variables=functools.partial(trained, steps),
        steps=steps,
    )


def permuted(study: Study, pattern: str) -> tuple[dict, nm.PermuteReport]:
    """The variables with their channels in a better order, running statistics among them."""
    network = study.network

    def forward(variables, *inputs):
        outputs = network.module.apply(variables, *inputs)
        # An embedding of sentences is an output; what is made of embeddings does not know the order of its entries.
        return outputs @ outputs.T if network.name == "minilm" else outputs

    inputs = tuple(x[:4] for x in study.samples[0][0])
    last = pattern if network.name == "minilm" else None
    plan = nm.plan(forward, study.variables, *inputs, pattern=pattern, last=last)
    return nm.permute(forward, study.variables, *inputs, pattern=plan)


def in_parts(sample: list[tuple]) -> list[tuple]:
    """The same examples in smaller batches."""
    count = max(len(jax.tree.leaves(batch)[0]) for batch in sample)
    parts = range(0, count, BATCH)
    return [tuple(x[k : k + BATCH] for x in batch) for batch in sample for k in parts if len(batch[0]) >= k + BATCH]


def measure(run: Run) -> dict:
    """Every pattern; each method on top of the one before."""
    network = network_of(run.part, run.quick)
    variables, tests, samples = network.variables(), test_limit(run.args), 1 if run.quick else run.args.samples
    study = Study(network, variables, run.quick, tests)
    study.samples = study.samples[:samples]
    rows, layers, seconds = study.baseline("dense"), {}, {}
    with run.progress() as progress:
        for pattern in progress.track(run.args.patterns[:1] if run.quick else run.args.patterns, description=run.part):
            begun = time.perf_counter()
            orders, shares = [(study, "")], {}
            if "permutation" in run.args.methods:
                others, report = permuted(study, pattern)
                seconds[f"{pattern}, permutation"] = time.perf_counter() - begun
                orders.append((Study(network, others, run.quick, tests), "permuted, "))
                orders[-1][0].samples = study.samples
                shares = {layer.path: [layer.before, layer.after] for layer in report.layers}
            found, reports, times = of_pattern(orders, pattern, run)
            rows, layers[pattern] = rows + found, {"permutation": shares, "blocks": reports}
            seconds |= {f"{pattern}, {name}": value for name, value in times.items()}
            run.keep(study.facts() | {"rows": rows, "layers": layers, "seconds": seconds})
    return study.facts() | {"rows": rows, "layers": layers, "seconds": seconds}


def of_pattern(orders: list[tuple[Study, str]], pattern: str, run: Run) -> tuple[list[dict], list[dict], dict]:
    """The rows of one pattern, what became of each block, and how long it took."""
    values: dict[str, list[float]] = {}
    reports: list[dict] = []
    seconds: dict[str, float] = {}

    def judged(name: str, own: Study, params: Any, rules: Any, k: int) -> None:
        if not nm.verify(params, rules).ok:
            raise RuntimeError(f"{own.network.name}, {name}: breaks its pattern\n{nm.verify(params, rules)}")
        values.setdefault(name, []).append(own.evaluate(params))
        if own.tunable:
            values.setdefault(f"{name} + BNT", []).append(own.evaluate_tuned(params, own.samples[k]))

    for k in range(len(orders[0][0].samples)):
        for own, order in orders:
            rules = own.plan(pattern)
            masks = nm.compute_masks(own.params, rules)
            judged(name := f"{order}masks alone", own, nm.apply_masks(own.params, masks), rules, k)
            new = nm.reconstruct_layers(own.params, masks, own.grams[k])[0]
            judged(name := f"{order}AdaPrune", own, new, rules, k)
            if "swaps" in run.args.methods:
                begun = time.perf_counter()
                masks, _ = nm.refine_masks(own.params, masks, rules, own.grams[k])
                seconds[f"{order}swaps"] = time.perf_counter() - begun
                new = nm.reconstruct_layers(own.params, masks, own.grams[k])[0]
                judged(name := f"{order}swaps, AdaPrune", own, new, rules, k)
            if "blocks" in run.args.methods:
                begun = time.perf_counter()
                new, report = fitted(own, new, masks, k, run)
                seconds[f"{order}blocks"] = time.perf_counter() - begun
                judged(name := f"{name}, blocks", own, new, rules, k)
                reports.append(_blocks(report) | {"method": name, "sample": k})
    return [{"setting": pattern, "method": name, "values": found} for name, found in values.items()], reports, seconds


def fitted(study: Study, params: Any, masks: Any, k: int, run: Run) -> tuple[Any, nm.BlockReport]:
    """Blocks fitted together on one sample."""
    return nm.fit_blocks(
        study.apply,
        study.params,
        params,
        masks,
        in_parts(study.samples[k]),
        row_mask=row_mask if study.network.name == "minilm" else None,
        layers=run.args.layers,
        steps=5 if run.quick else run.args.steps,
    )


def _blocks(report: nm.BlockReport) -> dict:
    assert report.before is not None and report.after is not None
    each = [{"paths": b.paths, "before": b.before, "after": b.after, "steps": b.steps} for b in report.blocks]
    return {"blocks": each, "before": report.before.error, "after": report.after.error, "undone": report.undone}


def tables(result: dict) -> list[Table]:
    """A row for each method, a column for each pattern; and what fitting did to the outputs."""
    whole = table(result)
    patterns = [row[0] for row in whole.rows]
    columns = [
        (method, *(row[k] for row in whole.rows)) for k, method in enumerate(whole.header) if k and method != "none"
    ]
    dense = [("dense", whole.rows[0][1], *([None] * (len(patterns) - 1)))]
    blocks = [
        (pattern, row["method"], row["sample"], len(row["blocks"]), f"{row['before']:.4f}", f"{row['after']:.4f}")
        for pattern, layers in result["layers"].items()
        for row in layers["blocks"]
    ]
    header = ("pattern", "method", "sample", "blocks", "error before", "after")
    return [
        Table("methods", ("", *patterns), [*dense, *columns], whole.title, whole.notes),
        Table("blocks", header, blocks, "Outputs of the network on inputs held out, before and after fitting"),
    ]


def problems(result: dict) -> list[str]:
    """Networks that fitting has made worse where it was judged."""
    return [
        f"{pattern}, {row['method']}: error of the outputs {row['before']:.4g} -> {row['after']:.4g}"
        for pattern, layers in result["layers"].items()
        for row in layers["blocks"]
        if row["after"] > row["before"]
    ]


def more_options(parser: argparse.ArgumentParser) -> None:
    """Which patterns, on how many samples, and how long blocks are fitted."""
    options(parser)
    parser.add_argument("--patterns", nargs="+", default=["2:4", "2:4-T"], help="patterns (default 2:4 2:4-T)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="what to do (default: all)")
    parser.add_argument("--samples", type=int, default=len(SEEDS), help="calibration samples (default 3)")
    parser.add_argument("--steps", type=int, default=300, help="steps of Adam for each block (default 300)")
    parser.add_argument("--layers", type=int, default=2, help="sparse layers of a block, at least (default 2)")


EXPERIMENT = Experiment(measure, tables, problems=problems, options=more_options, parts=("bottlenecks", *NETWORKS))
