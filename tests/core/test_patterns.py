import itertools
import time

import jax.numpy as jnp
import numpy as np
import pytest

import nm_jax as nm
from nm_jax import NM, SequentialNM, TransposableNM, Unstructured

# Table 1 of the paper, 8 x 8: what it prints, and the size of one unit of its last printed digit.
TABLE_1 = {
    "US-0.5": (1.8e18, 1e17),
    "1:2": (4e9, 1e9),
    "2:4": (2.8e12, 1e11),
    "4:8": (5.7e14, 1e13),
    "1:2-T": (6e4, 1e4),
    "2:4-T": (4e8, 1e8),
    "4:8-T": (1.7e13, 1e12),
    "1:2-S": (4e9, 1e9),
    "2:4-S": (4e7, 1e7),
    "4:8-S": (4e5, 1e5),
}
# True counts; Eq. 2 over-counts transposable masks.
TRUE_COUNTS = {"1:2-T": 2**16, "2:4-T": 90**4, "4:8-T": 116963796250}


@pytest.mark.parametrize("pattern", TABLE_1)
def test_table_1_of_the_paper(pattern):
    """Twelve entries: the unstructured row prints the same number three times."""
    printed, unit = TABLE_1[pattern]
    count = nm.mask_diversity(pattern, (8, 8))
    assert isinstance(count, int)
    assert abs(count - printed) <= unit
    assert nm.mask_diversity(pattern, (8, 8), exact=True) == TRUE_COUNTS.get(pattern, count)


@pytest.mark.parametrize(
    ("n", "m", "at_most"), [(1, 2, False), (1, 2, True), (1, 3, False), (2, 3, True), (2, 4, False), (3, 4, True)]
)
def test_exact_transposable_diversity_equals_enumeration(n, m, at_most):
    count = 0
    for bits in itertools.product((0, 1), repeat=m * m):
        sums = np.array(bits).reshape(m, m)
        sums = np.concatenate([sums.sum(0), sums.sum(1)])
        count += bool((sums <= n).all() if at_most else (sums == n).all())
    assert nm.mask_diversity(TransposableNM(n, m, at_most), (m, m), exact=True) == count


def test_exact_diversity_up_to_8_takes_less_than_a_second():
    # Not a benchmark: the bound is the contract of the docstring, and the work is a few hundred times smaller.
    start = time.perf_counter()
    counts = [nm.mask_diversity(TransposableNM(n, 8), (8, 8), exact=True) for n in range(1, 8)]
    assert time.perf_counter() - start < 7
    assert counts == counts[::-1]  # keeping n and pruning n are the same count
    assert counts[0] == 40320


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("2:4", NM(2, 4)),
        ("1:4", NM(1, 4)),
        ("2:4-T", TransposableNM(2, 4)),
        ("16:32-T", TransposableNM(16, 32)),
        ("2:4-T-at-most", TransposableNM(2, 4, at_most=True)),
        ("4:8-S", SequentialNM(4, 8)),
        ("US-0.5", Unstructured(0.5)),
        ("US-.86", Unstructured(0.86)),
    ],
)
def test_parse_and_spell(text, pattern):
    assert nm.parse_pattern(text) == pattern
    assert nm.parse_pattern(str(pattern)) == pattern
    assert nm.parse_pattern(pattern) is pattern
    assert hash(pattern) == hash(nm.parse_pattern(text))


@pytest.mark.unchecked
@pytest.mark.parametrize(
    "text", ["", "2-4", "2:4-X", "2:4T", "4:2", "4:4", "0:4", "US-1.5", "US-0", "US-0.0", None, 24]
)
def test_wrong_patterns_say_what_to_write(text):
    with pytest.raises(ValueError, match=r"n:m|0 < sparsity"):
        nm.parse_pattern(text)


@pytest.mark.unchecked
@pytest.mark.parametrize("kind", [NM, TransposableNM, SequentialNM])
@pytest.mark.parametrize(("n", "m"), [(3, 2), (2, 2), (0, 4), (-1, 4), (1.0, 2), (True, 2)])
def test_wrong_numbers(kind, n, m):
    with pytest.raises(ValueError, match=r"1 <= n < m|integer"):
        kind(n, m)


def test_density():
    assert NM(1, 4).density == TransposableNM(2, 8).density == Unstructured(0.75).density == 0.25


def test_diversity_of_a_shape_that_does_not_fit():
    with pytest.raises(ValueError, match="do not fit"):
        nm.mask_diversity("2:4-T", (8, 6))
    with pytest.raises(ValueError, match="exact=True"):
        nm.mask_diversity("2:4-T-at-most", (8, 8))
    with pytest.raises(ValueError, match="shape"):
        nm.mask_diversity("2:4", (8,))


@pytest.mark.parametrize("pattern", [NM(2, 4), TransposableNM(2, 4), TransposableNM(2, 4, True), SequentialNM(2, 4)])
def test_allows_and_full_by_enumeration(pattern):
    """`allows` is 'no group keeps too many', `full` also 'none keeps too few', on every tile there is (or on many)."""
    rows, cols = pattern.tile
    rng = np.random.default_rng(0)
    if cols == 1:
        bits = np.array(list(itertools.product((False, True), repeat=rows)))
    else:
        bits = rng.random((20000, rows * cols)) < rng.choice([0.3, 0.5, 0.6], (20000, 1))
    kept = bits.reshape(-1, rows, cols)

    def allowed(tile):
        sums = [tile.sum(0), tile.sum(1)] if isinstance(pattern, TransposableNM) else [tile.sum(0)]
        few = all((s <= pattern.n).all() for s in sums)
        text = "".join("x" if k else "0" for k in tile[:, 0])
        return few and (not isinstance(pattern, SequentialNM) or "00" in text)

    def full(tile):
        exactly = pattern.n * (1 if cols == 1 else rows)
        return allowed(tile) and (getattr(pattern, "at_most", False) or tile.sum() == exactly)

    stacked = jnp.asarray(np.moveaxis(kept, 0, -1))
    assert np.asarray(pattern.allows(stacked)).tolist() == [bool(allowed(tile)) for tile in kept]
    assert np.asarray(pattern.full(stacked)).tolist() == [bool(full(tile)) for tile in kept]
    assert any(full(tile) for tile in kept)


@pytest.mark.parametrize("pattern", ["8:16-T", "16:32-T", "8:16-T-at-most"])
def test_counts_that_would_take_for_ever_are_refused(pattern):
    with pytest.raises(ValueError, match="too many to be counted exactly"):
        nm.mask_diversity(pattern, (32, 32), exact=True)


def test_counting_the_zeros_counts_the_same():
    assert nm.mask_diversity("3:4-T", (4, 4), exact=True) == nm.mask_diversity("1:4-T", (4, 4), exact=True) == 24
