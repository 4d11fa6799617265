"""`Exact`, phase 2: shortest augmenting paths, for blocks that prices alone do not solve."""

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from nm_jax._core.patterns import TransposableNM
from nm_jax.solvers._exact_bits import bit, column_counts, largest, pick, positive, smallest, total
from nm_jax.solvers._exact_descent import descending
from nm_jax.solvers.base import blank

_FAR = 1 << 30  # longer than any path, and twice that still fits


class _Paths(NamedTuple):
    """Shortest paths from the sources to all columns (and the pool, which comes last) and rows.

    The parent of a row is the node (column, or pool) that would lose the unit that the row gives up. The parent of a
    node is the row that would take it, or one of the codes below.
    """

    to_column: Int[Array, "nodes blocks"]
    column_parent: Int[Array, "nodes blocks"]
    to_row: Int[Array, "m blocks"]
    row_parent: Int[Array, "m blocks"]


_ROOT = -1  # parent of a source, where paths begin


def _without_row(node, m: int):
    """Parent of what a node hands over to directly, as the pool to a column and a column to the pool."""
    return m + node


def _node_before(parent, m: int):
    """The inverse of `_without_row`."""
    return parent - m


def _is_row(parent, m: int):
    """Whether the parent of a node is a row."""
    return (parent >= 0) & (parent < m)


def _is_column(node, m: int):
    """Whether a node is a column; else it is the pool, which comes last."""
    return node < m


def augment(
    grid: Int[Array, "m m blocks"], v: Int[Array, "m blocks"], pattern: TransposableNM
) -> tuple[Int[Array, "m blocks"], Int[Array, "m blocks"], Int[Array, "m blocks"]]:
    """The optimum from any column prices: row bitmasks, and prices u, v that prove it.

    At most n: `filled` counts the units that columns got from the pool, and a row with fewer than n kept entries keeps
    the others in the pool. Both give the pool's own balance.
    """
    m, n = pattern.m, pattern.n
    v = _align(grid, v, pattern)
    if not pattern.at_most:
        v = v - functools.reduce(jnp.minimum, [v[j] for j in range(m)])[None]
    bits = _keep_rows(grid, v, pattern)
    counts = column_counts(bits)
    filled = jnp.where(v > 0, 0, jnp.maximum(n - counts, 0)) if pattern.at_most else jnp.zeros_like(v)
    excess = counts + filled - n
    if pattern.at_most:
        excess = jnp.concatenate([excess, -jnp.sum(excess, axis=0, keepdims=True, dtype=jnp.int32)])
    # Prices beyond this could, in theory, add up over the rounds to more than int32 holds.
    ceiling = largest(v) + (1 << 28)

    def unfinished(carry):
        return jnp.any(carry[3] > 0)

    def round_(carry):
        bits, v, filled, excess = carry
        slack = _encoded_slack(grid, bits, v, pattern)
        paths, reach = _shortest_paths(slack, bits, v, filled, excess, ceiling, pattern)
        closer = jnp.maximum(reach[None] - paths.to_column, 0)
        bits, filled, excess = _move_units(paths, reach, bits, filled, excess, pattern)
        v = v + (closer[:m] - closer[m:] if pattern.at_most else closer)  # the pool's price stays 0
        return bits, v, filled, excess

    bits, v, _, _ = lax.while_loop(unfinished, round_, (bits, v, filled, excess))
    return bits, _row_prices(grid, bits, v, pattern), v


def _keep_rows(grid, v, pattern: TransposableNM) -> Int[Array, "m blocks"]:
    """Row bitmasks of the n largest of w_ij - v_j (of the positive ones, at most n).

    Row after row, ties go to the columns that still need most, which leaves few units astray.
    """
    m, n = pattern.m, pattern.n
    level = descending([grid[:, j] - v[j][None] for j in range(m)])[n - 1]
    if pattern.at_most:
        level = jnp.maximum(level, 0)
    sure = total([positive(grid[:, j] - v[j][None] - level) << j for j in range(m)])
    need = n - column_counts(sure)
    column = lax.broadcasted_iota(jnp.int32, v.shape, 0)
    never, always = 0, 1 << 20

    def keep(i, carry):
        bits, need = carry
        value = lax.dynamic_index_in_dim(grid, i, 0, keepdims=False) - v
        row_level = lax.dynamic_index_in_dim(level, i, 0, keepdims=True)
        tied = value == row_level
        if pattern.at_most:  # at level 0 the pool is as good; only a column that has a price must be filled
            tied = tied & ((row_level > 0) | ((v > 0) & (need > 0)))
        # Distinct among the tied, so that exactly n entries reach the n-th largest.
        key = jnp.where(value > row_level, always, jnp.where(tied, (need + m) * m + (column + i) % m + 1, never))
        nth = descending([key[j] for j in range(m)])[n - 1]
        kept = ((key >= nth[None]) & (key > never)).astype(jnp.int32)
        row = total([kept[j] << j for j in range(m)])
        need = need - jnp.where(tied, kept, 0)
        return lax.dynamic_update_index_in_dim(bits, row, i, 0), need

    return lax.fori_loop(0, m, keep, (jnp.zeros_like(v), need))[0]


def _align(grid, v, pattern: TransposableNM) -> Int[Array, "m blocks"]:
    """Column prices that are near v and are scores minus other prices.

    Midpoints are as good a proof, but hide ties: where scores take few values, prices on their lattice leave many
    entries at r = 0, free to go to whichever column needs them.
    """

    def ends(values):
        nth = descending(values)[pattern.n - 1]
        return jnp.maximum(nth, 0) if pattern.at_most else nth

    def sweep(_, v):
        u = ends([grid[:, j] - v[j][None] for j in range(pattern.m)])
        return ends([grid[i] - u[i][None] for i in range(pattern.m)])

    return lax.fori_loop(0, 2, sweep, v)


def _row_prices(grid, bits, v, pattern: TransposableNM) -> Int[Array, "m blocks"]:
    """The least value that a row keeps (what it keeps in the pool is worth 0)."""
    m = pattern.m
    idle = lax.population_count(bits) < pattern.n
    least = jnp.where(idle, 0, _FAR) if pattern.at_most else jnp.full_like(v, _FAR)
    for j in range(m):
        least = jnp.where(bit(bits, j), jnp.minimum(least, grid[:, j] - v[j][None]), least)
    return least


def _encoded_slack(grid, bits, v, pattern: TransposableNM) -> tuple[Int[Array, "m m blocks"], Int[Array, "m blocks"]]:
    """What each entry costs a path, with the mask in the sign: r for a kept entry, ~(-r) for a pruned one; and u."""
    u = _row_prices(grid, bits, v, pattern)
    column = lax.broadcasted_iota(jnp.int32, grid.shape, 1)
    kept = lax.shift_right_logical(jnp.broadcast_to(bits[:, None], grid.shape), column) & 1
    return grid - v[None] - u[:, None] - (1 - kept), u


def _shortest_paths(slack, bits, v, filled, excess, ceiling, pattern: TransposableNM):
    """Bellman-Ford from all sources at once, and how far units shall be moved.

    Units may go to any sink within `reach`, from the nearest to the farthest one: the farther, the more are brought
    home in one round. Prices rise by up to `reach`; when they come near their ceiling only the nearest sink is served,
    which never raises a price beyond that of a sink plus the longest path.

    A source reaches every sink: it has more than n rows, whose entries in a sink cannot all be kept.
    """
    m = pattern.m
    slack, u = slack
    sink = excess < 0
    idle = lax.population_count(bits) < pattern.n

    def farthest(to_column):
        return largest(jnp.where(sink, to_column, -1))

    def through_column(j, carry):
        to_row, row_parent, to_column = carry
        cost = lax.dynamic_index_in_dim(slack, j, 1, keepdims=False)
        through = jnp.where(cost >= 0, lax.dynamic_index_in_dim(to_column, j, 0) + cost, _FAR)
        return jnp.minimum(through, to_row), jnp.where(through < to_row, j, row_parent), to_column

    def through_row(i, carry):
        to_column, column_parent, to_row = carry
        cost = lax.dynamic_index_in_dim(slack, i, 0, keepdims=False)
        through = jnp.where(cost < 0, lax.dynamic_index_in_dim(to_row, i, 0) + ~cost, _FAR)
        return jnp.minimum(through, to_column), jnp.where(through < to_column, i, column_parent), to_row

    def relax(carry):
        before, column_parent, to_row, row_parent = carry[0]
        columns, pool = before[:m], before[m:]
        to_row, row_parent, _ = lax.fori_loop(0, m, through_column, (to_row, row_parent, columns))
        if pattern.at_most:
            through = jnp.where(idle, pool, _FAR)
            to_row, row_parent = jnp.minimum(through, to_row), jnp.where(through < to_row, m, row_parent)
        # What is farther than every sink is of no use.
        limit = jnp.minimum(before, farthest(before)[None])
        columns, parents, _ = lax.fori_loop(0, m, through_row, (limit[:m], column_parent[:m], to_row))
        if pattern.at_most:
            pool, pool_parent = limit[m:], column_parent[m:]
            for parent, through in [(i, to_row[i] + u[i]) for i in range(m)] + [
                (_without_row(j, m), jnp.where(filled[j] > 0, before[j], _FAR)) for j in range(m)
            ]:
                pool_parent = jnp.where(through[None] < pool, parent, pool_parent)
                pool = jnp.minimum(through[None], pool)
            through = pool + v
            columns, parents = jnp.minimum(through, columns), jnp.where(through < columns, _without_row(m, m), parents)
            columns, parents = jnp.concatenate([columns, pool]), jnp.concatenate([parents, pool_parent])
        improved = columns < limit
        columns, parents = jnp.where(improved, columns, before), jnp.where(improved, parents, column_parent)
        return _Paths(columns, parents, to_row, row_parent), jnp.any(improved)

    start = _Paths(
        jnp.where(excess > 0, 0, _FAR),
        jnp.full_like(excess, _ROOT),
        jnp.full_like(bits, _FAR),
        jnp.full_like(bits, _ROOT),
    )
    paths, _ = lax.while_loop(lambda carry: carry[1], relax, (start, ~blank((), bool, bits)))
    nearest = smallest(jnp.where(sink, paths.to_column, _FAR))
    reach = jnp.maximum(nearest, jnp.minimum(farthest(paths.to_column), ceiling - largest(v)))
    return paths, jnp.where(nearest < _FAR, reach, 0)  # 0: a block without sources


def _move_units(paths: _Paths, reach, bits, filled, excess, pattern: TransposableNM):
    """Moves a unit to every sink within reach whose path crosses no other.

    First every block walks its paths back from the sinks, one step at a time, and notes the rows and columns on those
    that it will use; a path that meets a row or column in use, or a source with nothing left, is given up. Then all
    the noted entries change at once.
    """
    m = pattern.m
    nodes = excess.shape[0]
    node = lax.broadcasted_iota(jnp.int32, excess.shape, 0)
    open_ = (excess < 0) & (paths.to_column <= reach[None])
    nothing = blank(excess.shape[1:], jnp.int32, excess)

    def step(carry):
        excess, open_, at, sink, path, taken = carry
        # Blocks that are between two paths begin the next.
        begin = (at < 0) & functools.reduce(jnp.logical_or, [open_[j] for j in range(nodes)])
        first = smallest(jnp.where(open_, node, nodes))
        at, sink = jnp.where(begin, first, at), jnp.where(begin, first, sink)
        open_ = open_ & ~((node == first[None]) & begin[None])
        path = tuple(jnp.where(begin, t, p) for t, p in zip(taken, path, strict=True))
        rows, cols, pool = path
        taken_rows, taken_cols, _ = taken

        walking = at >= 0
        parent = pick(paths.column_parent, at)
        root = walking & (parent == _ROOT)
        arrived = root & (pick(excess, at) > 0)
        by_row = walking & _is_row(parent, m)
        row_bit = jnp.where(by_row, 1 << jnp.clip(parent, 0, m - 1), 0)
        col_bit = jnp.where(walking & ~root & _is_column(at, m), 1 << jnp.clip(at, 0, m - 1), 0)
        crossed = ((taken_rows & row_bit) | (taken_cols & col_bit)) != 0
        path = (rows | row_bit, cols | col_bit, jnp.where(walking & ~root & (at == m), 1, pool))

        change = jnp.where(node == at[None], -1, 0) + jnp.where(node == sink[None], 1, 0)
        excess = excess + jnp.where(arrived[None], change, 0)
        taken = tuple(jnp.where(arrived, p, t) for p, t in zip(path, taken, strict=True))
        following = jnp.where(by_row, pick(paths.row_parent, parent), _node_before(parent, m))
        at = jnp.where(walking & ~root & ~crossed, following, -1)
        return excess, open_, at, sink, path, taken

    def walking(carry):
        return jnp.any(carry[1]) | jnp.any(carry[2] >= 0)

    none = (nothing, nothing, nothing)
    start = (excess, open_, nothing - 1, nothing - 1, none, none)
    excess, _, _, _, _, (rows, cols, pool) = lax.while_loop(walking, step, start)

    row = lax.broadcasted_iota(jnp.int32, bits.shape, 0)
    lost = jnp.where(
        bit(rows[None], row) & _is_column(paths.row_parent, m), 1 << jnp.clip(paths.row_parent, 0, m - 1), 0
    )
    bits = bits ^ lost
    for j in range(m):
        gains = bit(cols, j)[None] & (row == paths.column_parent[j][None])
        bits = bits ^ jnp.where(gains, jnp.int32(1) << j, 0)
    if pattern.at_most:
        from_pool = bit(cols[None], row) & (paths.column_parent[:m] == _without_row(m, m))
        to_pool = (pool != 0)[None] & (paths.column_parent[m][None] == _without_row(row, m))
        filled = filled + from_pool.astype(jnp.int32) - to_pool.astype(jnp.int32)
    return bits, filled, excess
