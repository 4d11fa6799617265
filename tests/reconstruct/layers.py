"""Layers of every kind, and the exact minimiser in double precision."""

import dataclasses

import jax.numpy as jnp
import numpy as np

import nm_jax as nm

# name -> (shape, contraction, groups): every way in which weights meet their inputs.
LAYERS = {
    "dense": ((16, 12), "io", 1),
    "torch": ((12, 16), "oi", 1),
    "convolution": ((3, 3, 4, 8), "iiio", 1),
    "grouped convolution": ((3, 1, 4, 8), "iiio", 2),
    "query": ((16, 2, 4), "ioo", 1),
    "attention out": ((2, 8, 5), "iio", 1),
    "experts": ((3, 8, 6), "bio", 1),
    "experts, one input": ((3, 8, 6), "oio", 1),
    "scanned attention out": ((2, 2, 4, 6), "biio", 1),
}


def matrices(leaf, contraction, groups=1):
    """(matrices, K, outputs) of a leaf, in float64 by numpy alone."""
    leaf = np.asarray(leaf, np.float64)
    order = [k for letter in "bio" for k, c in enumerate(contraction) if c == letter]
    sizes = [int(np.prod([leaf.shape[k] for k, c in enumerate(contraction) if c == letter])) for letter in "bio"]
    whole = leaf.transpose(order).reshape(sizes)
    return np.concatenate([np.stack(np.split(one, groups, axis=1)) for one in whole])


def minimiser(x, w, kept, ridge, centred=False):
    """Output by output: argmin ||X w - X v||^2 + ridge mean(diag X^T X) ||w - v||^2 on the support, in float64."""
    x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
    x = x - x.mean(axis=0) if centred else x
    pull = np.sqrt(ridge * np.mean(np.sum(x**2, axis=0)))
    rows = np.concatenate([x, pull * np.eye(len(w))])
    new = np.zeros_like(w)
    for k in range(w.shape[1]):
        support = np.flatnonzero(kept[:, k])
        new[support, k] = np.linalg.lstsq(rows[:, support], rows @ w[:, k], rcond=None)[0]
    return new


def error(x, w, new):
    x, w, new = (np.asarray(a, np.float64) for a in (x, w, new))
    return np.sum((x @ (new - w)) ** 2) / np.sum((x @ w) ** 2)


def make_layer(name, rows=200, seed=0):
    """Weights, correlated inputs with a mean, their record, and a random mask."""
    shape, contraction, groups = LAYERS[name]
    draw = np.random.default_rng(seed)
    w = draw.normal(size=shape).astype(np.float32)
    count, size, _ = matrices(w, contraction, groups).shape
    mixing = draw.normal(size=(count, size, size)) * draw.gamma(1.0, size=(count, 1, size))
    x = (draw.normal(size=(count, rows, size)) @ mixing + draw.normal(size=(count, 1, size))).astype(np.float32)
    mask = draw.random(shape) < 0.5
    gram = dataclasses.replace(nm.Gram.from_inputs(jnp.asarray(x)), contraction=contraction, groups=groups)
    return jnp.asarray(w), x, gram, jnp.asarray(mask)
