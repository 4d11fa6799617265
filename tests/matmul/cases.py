"""Cases and oracles of sparse products that share no code with the library."""

import contextlib
import itertools
import re
from unittest import mock

import jax
import jaxtyping
import numpy as np
import pytest

from experiments.bench import masks

PAIRS = list(itertools.combinations(range(4), 2))  # the six ways to keep two of four


@contextlib.contextmanager
def refused(words):
    """Expects a ValueError with these words; where annotations are checked at every call, they may refuse first."""
    with pytest.raises((ValueError, jaxtyping.TypeCheckError)) as caught:
        yield
    assert isinstance(caught.value, jaxtyping.TypeCheckError) or re.search(words, str(caught.value))


def gpu(capability, name=None):
    """What the library sees of a GPU that is not there."""
    described = {"platform": "gpu", "device_kind": name or f"GPU {capability}", "compute_capability": capability}
    return mock.Mock(spec=jax.Device, **described)


def all_pairs(rows, k, seed=0):
    """A weight (rows, k) in float32 and its 2:4 mask along k, in which each of the 36 pairs of patterns of neighbouring
    groups occurs if there are 36 of them."""
    generator = np.random.default_rng(seed)
    mask = masks.all_pairs(generator, k, rows).T
    return generator.normal(size=(rows, k)).astype(np.float32), np.array(mask)


def transposable(k, rows, seed=0):
    """A random 2:4-T mask (k, rows): blocks of 4 x 4 with two kept in each row and column."""
    return masks.transposable(np.random.default_rng(seed), k, rows)


def leaf_mask(shape, letters):
    """A 2:4-T mask of a leaf whose dimensions are `i`nputs, `o`utputs or `b`atch-like."""
    order = [dim for letter in "bio" for dim in range(len(shape)) if letters[dim] == letter]
    sizes = [int(np.prod([size for size, is_a in zip(shape, letters, strict=True) if is_a == a])) for a in "bio"]
    masks = np.stack([transposable(*sizes[1:], seed) for seed in range(sizes[0])])
    return masks.reshape([shape[dim] for dim in order]).transpose(np.argsort(order))


def words(mask):
    """Metadata of a mask (rows, k) that keeps exactly two of four, bit by bit: a nibble for a group, the first position
    in its low two bits; four groups in a word, the first lowest; what is missing of a word is positions 0 and 1."""
    rows, k = mask.shape
    found = []
    for row in range(rows):
        bits = ""
        for start in range(0, -(-k // 16) * 16, 4):
            first, second = np.flatnonzero(mask[row, start : start + 4]) if start < k else (0, 1)
            bits = f"{second:02b}{first:02b}" + bits
        found.append([int(bits[end - 16 : end], 2) for end in range(len(bits), 0, -16)])
    return np.array(found, np.uint16)
