"""Pretrained networks made sparse without training: AdaPrune, the bias fix and batch-norm tuning, on five networks.

Hubara et al., "Accelerated Sparse Neural Training: A Provable and Efficient Method to Find N:M Transposable Masks"
(NeurIPS 2021), Section 5 and A.1. Their Table A.1 has AdaPrune from dense: ResNet-50 76.1 % dense, 67.4 % bias fix,
74.4 % AdaPrune, 74.8 % with batch-norm tuning. The figures here are of smaller networks: compare them with the rows
"dense" and "dense + BNT" above them, which are of the same test data.

Masks are by magnitude and optimal; the first and the last layer stay dense (in MiniLM only the embedding does).
Calibrated on training data, judged on test data; mean and standard deviation over three calibration samples. Exits with
status 1 when a layer's error grew, or is more than 1 % above the exact minimiser's.

Paper: Table A.1
Time: 10 minutes a network on 2 cores
Data: pretrained weights, CIFAR, STS-B (NM_JAX_DATA)
"""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

import nm_jax as nm
from experiments.adaprune.study import Study, by_path, options, table, test_limit
from experiments.harness import Experiment, Run, Table
from experiments.networks import NETWORKS

PATTERNS = ("2:4", "4:8", "2:4-T", "4:8-T", "1:2")
EXCESS = 0.01  # that a reconstruction may have over the exact minimiser
LARGE = 384  # K from which the speed of a reconstruction is compared with that of Adam


def measure(run: Run) -> dict:
    """Every pattern and method from the dense weights of a network; and its layers one by one."""
    network = NETWORKS[run.part]
    study = Study(network, network.variables(), run.quick, test_limit(run.args))
    rows, layers = study.baseline("dense"), {}
    with run.progress() as progress:
        for pattern in progress.track(PATTERNS[2:3] if run.quick else PATTERNS, description=run.part):
            rules = study.plan(pattern)
            rows += study.rows(pattern, nm.compute_masks(study.params, rules), rules)
            if pattern in ("2:4", "2:4-T"):
                rows.append({"setting": pattern, "method": "AdaPrune, OBC masks", "values": obc_masks(study, rules)})
                layers[pattern] = layer_errors(study, rules)
        return study.facts() | {"rows": rows, "layers": layers, "solver": against_exact(study)}


def obc_masks(study: Study, rules: Any) -> list[float]:
    """The metric with masks of OBC scores, reconstructed, of every sample."""
    values = []
    for gram in study.grams:
        masks = nm.compute_masks(study.params, rules, scores=nm.score_tree(nm.obc, study.params, gram))
        params = nm.reconstruct_layers(study.params, masks, gram)[0]
        study.check(params, masks, rules)
        values.append(study.evaluate(params))
    return values


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


def tables(result: dict) -> list[Table]:
    """Every pattern and method; the reconstruction of single layers."""
    rows = result["solver"]
    worst = max(rows, key=lambda row: row["excess"])
    grown = sum(row["after"] > row["before"] for row in rows)
    cells = [
        ("layers and patterns", len(rows)),
        ("largest excess over the exact minimiser", f"{100 * worst['excess']:.2f} %"),
        ("where", f"{worst['path']}, {worst['pattern']}"),
        ("layers whose error grew", grown),
    ]
    if large := [row for row in rows if "adam_seconds" in row]:
        times = [row["adam_seconds"] / row["seconds"] for row in large]
        errors = [row["adam_held_out"] / row["held_out"] for row in large]
        cells += [
            (f"shapes with K >= {LARGE}", len(large)),
            ("time of 1000 iterations of Adam", _spread(times)),
            ("held-out error that they leave", _spread(errors)),
        ]
    notes = "Times and errors of Adam are relative to those of `nm.reconstruct`: the median, least and most."
    return [table(result), Table("layers", ("", result["network"]), cells, "Single layers, 2:4 and 2:4-T", notes)]


def _spread(values: list[float]) -> str:
    return f"{np.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def problems(result: dict) -> list[str]:
    """Reconstructions that are not what they should be."""
    return [
        f"{row['path']}, {row['pattern']}: error {row['before']:.4g} -> {row['after']:.4g}, {row['excess']:.2%} above "
        "the exact minimiser's"
        for row in result["solver"]
        if row["after"] > row["before"] or row["excess"] > EXCESS
    ]


EXPERIMENT = Experiment(measure, tables, problems=problems, options=options, parts=tuple(NETWORKS))
