"""Networks that are sparse already, made N:M sparse without training.

Hubara et al., "Accelerated Sparse Neural Training: A Provable and Efficient Method to Find N:M Transposable Masks"
(NeurIPS 2021), Section 5 and A.1. Their Table A.2 goes from 4:8 to 2:4 and 1:2 (ResNet-50: 76.5 -> 76.4 and 75.1 %),
their Fig. 5b from unstructured to N:M layer by layer (Eq. 4). Here a ResNet-20 is trained on from its pretrained
weights, sparse, and then converted; compare with the rows "dense", which were trained on alike.

Paper: Table A.2, Fig. 5b
Time: 50 minutes on 2 cores
Data: pretrained weights, CIFAR-10 (NM_JAX_DATA)
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import nm_jax as nm
from experiments.adaprune.study import Study, by_path, options, table, test_limit
from experiments.data import batches, packed
from experiments.harness import Experiment, Run, Table
from experiments.networks import NETWORKS, Classifier
from experiments.train import classification, fit

NETWORK = "resnet20-cifar10"
STEPS, RATE, BATCH = 400, 0.02, 128  # of sparse training, from the pretrained weights
QUICK_STEPS = 4
UNIFORM, OVERALL = "US-0.8", "80 % overall"  # unstructured: the same in every layer, or by one threshold for all
PERCENTS = (0.1, 1.0, 5.0, 10.0, 20.0, 50.0)


def trained_on(network: Classifier, rules: Any, steps: int, advance: Callable[[], None]) -> dict:
    """The pretrained network trained on for some steps, sparse where the rules say so; `None`: dense."""
    labels = packed.labels(network.train)
    chosen = batches.drawn(len(labels), BATCH, steps, seed=0)

    def batch(number):
        images = network.inputs(packed.images(network.train, chosen[number]))
        return jnp.asarray(images), jnp.asarray(labels[chosen[number]])

    tx = optax.sgd(optax.cosine_decay_schedule(RATE, steps), momentum=0.9)
    if rules is not None:
        tx = nm.recipes.paper(tx, rules)
    state = fit(classification(network.module, network.variables(), batch), tx, steps, advance=advance)
    return {"params": state.params, **state.extra}


def one_threshold(params: Any, rules: Any, sparsity: float) -> list[tuple[str, str]]:
    """Unstructured patterns whose sparsities differ: those that one threshold for all layers gives them."""
    dense = by_path(params)
    weights = {path: np.abs(dense[path]) for path in by_path(nm.compute_masks(params, rules))}
    threshold = np.quantile(np.concatenate([w.ravel() for w in weights.values()]), sparsity)
    return [(f"^{path}$", f"US-{min(np.mean(w < threshold), 0.98):.2f}") for path, w in weights.items()]


def measure(run: Run) -> dict:
    """Table A.2: 4:8 to 2:4 and 1:2; and Fig. 5b: unstructured to n:8, layer by layer."""
    network, steps = NETWORKS[NETWORK], QUICK_STEPS if run.quick else STEPS
    assert isinstance(network, Classifier)
    tests = test_limit(run.args)
    pretrained = Study(network, network.variables(), run.quick, tests)
    with run.progress() as progress:
        task = progress.add_task("training", total=(3 if run.quick else 5) * steps)

        def study(rules: Any) -> Study:
            variables = trained_on(network, rules, steps, lambda: progress.advance(task))
            return Study(network, variables, run.quick, tests)

        rows = pretrained.baseline("dense, as pretrained") + study(None).baseline("dense")
        for suffix in ("-T",) if run.quick else ("", "-T"):
            rows += from_larger_groups(study(pretrained.plan(f"4:8{suffix}")), suffix)
        uniform = pretrained.plan(UNIFORM)
        rows += from_unstructured(study(uniform), UNIFORM, PERCENTS[-1:] if run.quick else PERCENTS)
        if not run.quick:
            overall = one_threshold(pretrained.params, uniform, 0.8)
            rows += from_unstructured(study(overall), OVERALL, PERCENTS)
    return pretrained.facts() | {"rows": rows, "steps": steps, "rate": RATE, "batch": BATCH}


def from_larger_groups(start: Study, suffix: str) -> list[dict]:
    """From 4:8 to 2:4 and 1:2."""
    rows = start.baseline(f"4:8{suffix}")
    for target in (f"2:4{suffix}", f"1:2{suffix}"):
        rules = start.plan(target)
        violations = nm.pattern_violations(start.params, rules)
        for row in start.rows(f"4:8{suffix} to {target}", nm.fit_masks(start.params, rules), rules):
            rows.append(row | _mean_violations(violations))
    return rows


def from_unstructured(start: Study, name: str, percents: tuple[float, ...]) -> list[dict]:
    """To n:8 layer by layer, by the violations that are allowed."""
    rows = start.baseline(name)
    for percent in percents:
        rules = nm.choose_patterns(start.params, start.plan("4:8"), percent)
        masks = nm.fit_masks(start.params, rules)
        kept = jax.tree.leaves(masks)
        sparsity = 1 - sum(int(mask.sum()) for mask in kept) / sum(mask.size for mask in kept)
        more: dict[str, Any] = dict(_mean_violations(nm.pattern_violations(start.params, rules)))
        more |= {"start": name, "percent": percent, "sparsity": sparsity}
        more["patterns"] = {path.strip("^$"): str(pattern) for path, pattern, _ in rules}
        rows += [row | more for row in start.rows(f"{name}, {percent:g} %", masks, rules)]
    return rows


def _mean_violations(violations: list[nm.Violations]) -> dict[str, float]:
    return {name: float(np.mean([getattr(v, name) for v in violations])) for name in ("tiles", "weights")}


def tables(result: dict) -> list[Table]:
    """Every start, target and method."""
    return [table(result)]


EXPERIMENT = Experiment(measure, tables, options=options)
