"""One network, its calibration samples, and what every method makes of it."""

import argparse
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

import nm_jax as nm
from experiments.harness import Table
from experiments.networks import Network, row_mask

SEEDS = (0, 1, 2)
# Examples to calibrate on, and to test on where there are so many.
CALIBRATION = {"minilm": 320, "squeezenet": 250}
IMAGES, TEST, QUICK = 1000, 5000, 500


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

    def facts(self) -> dict:
        """What the figures are of."""
        return {
            "network": self.network.title,
            "metric": self.network.metric,
            "calibration": self.count,
            "samples": len(self.samples),
            "test": min(self.limit, self.network.tests),
        }


def by_path(tree: Any) -> dict[str, Any]:
    """The leaves, Gram matrices or arrays, by '/'-joined keys."""
    nodes = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: isinstance(node, nm.Gram))[0]
    return {"/".join(key.key for key in keys): leaf for keys, leaf in nodes}


def options(parser: argparse.ArgumentParser) -> None:
    """How many test examples."""
    parser.add_argument("--test", type=int, help=f"test examples at the most (default {TEST}, with --quick {QUICK})")


def test_limit(args: argparse.Namespace) -> int:
    """How many test examples to judge on."""
    return args.test or (QUICK if args.quick else TEST)


def summary(values: list[float]) -> str:
    """Mean and, of several, standard deviation."""
    spread = f" ±{np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
    return f"{np.mean(values):.2f}{spread}"


def table(result: dict) -> Table:
    """One line per setting, one column per method."""
    methods = list(dict.fromkeys(row["method"] for row in result["rows"]))
    rows = []
    for setting in dict.fromkeys(row["setting"] for row in result["rows"]):
        found = {row["method"]: row["values"] for row in result["rows"] if row["setting"] == setting}
        rows.append((setting, *(summary(found[m]) if m in found else None for m in methods)))
    title = f"{result['network']}: {result['metric']} in %"
    notes = (
        f"{result['samples']} samples of {result['calibration']} training examples, {result['test']} test examples; "
        "none: masks alone; BNT: batch-norm tuning"
    )
    return Table("methods", ("", *methods), rows, title, notes)
