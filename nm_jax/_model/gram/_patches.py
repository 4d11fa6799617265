"""Second moments of the patches of a convolution, which are never all there at once."""

import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Num

from nm_jax._model.gram._moments import Moments, outer
from nm_jax._model.tracing.windows import Windows


def window_moments(
    x: Num[Array, "images *space features"], windows: Windows, keep: Bool[Array, "*rows"] | None = None
) -> Moments:
    """The moments of the patches that a convolution contracts: K runs over kernel positions, then features; one set
    per feature group.

    Args:
      x: activations.
      windows: of the convolution.
      keep: which patches count, for the leading dimensions of (images, *outputs).

    Patches are never all there at once: a loop goes over the first dimension of space (a line is one row of a plane,
    and its patches are). Where that has no stride, two kernel rows at the same distance share their products, so that
    a 3 x 3 kernel costs 3 products of kernel rows instead of 9. In planes without any stride so do two positions of
    kernel rows, and a 3 x 3 kernel costs 15 products of positions instead of 81, beside those at both ends of a line.
    """
    padding = [(0, 0, 0), *((*pad, spread - 1) for pad, spread in zip(windows.padding, windows.spread, strict=True))]
    x = x.astype(jnp.float32).reshape(*x.shape[:-1], windows.groups, -1)
    x = lax.pad(x, jnp.float32(0), [*padding, (0, 0, 0), (0, 0, 0)])
    if len(windows.kernel) == 1:  # rows of one position would be many, and short
        x, windows = x[:, None], _under_one_row(windows)
        keep = keep[:, None] if keep is not None and keep.ndim > 1 else keep
    outputs = windows.outputs(x.shape[1:-2])
    count = jnp.float32(x.shape[0] * math.prod(outputs))
    if keep is not None:
        count = jnp.sum(keep, dtype=jnp.float32) * math.prod(outputs[keep.ndim - 1 :])
        if keep.ndim == 1:
            x = jnp.where(keep.reshape(-1, *(1,) * (x.ndim - 1)), x, 0)
            keep = None
        else:
            keep = jnp.broadcast_to(
                keep.reshape(*keep.shape, *(1,) * (len(outputs) + 1 - keep.ndim)), (x.shape[0], *outputs)
            )
    if windows.strides[0] == 1 and keep is None:
        h, total = _sliding(x, windows, outputs)
    else:
        h, total = _stepping(x, windows, outputs, keep)
    return Moments(h, total, jnp.full(windows.groups, count))


def _under_one_row(windows: Windows) -> Windows:
    """The same windows over one row of a plane."""
    one = ((1, *windows.kernel), (1, *windows.strides), ((0, 0), *windows.padding))
    return Windows(*one, (1, *windows.spread), (1, *windows.dilation), windows.groups)


def _patch_row(x: Array, row: Array, windows: Windows) -> Float[Array, "images _ groups K"]:
    """The patches of one row of the first dimension of space, over the other dimensions of it."""
    y = lax.dynamic_index_in_dim(x, row, axis=1, keepdims=False)
    for axis in range(len(windows.kernel) - 1, 0, -1):
        y = _side_by_side(y, windows.kernel[axis], windows.dilation[axis], windows.strides[axis], axis)
    return y.reshape(y.shape[0], -1, *y.shape[-2:])


def _side_by_side(y: Array, kernel: int, dilation: int, stride: int = 1, axis: int = 1) -> Array:
    """The windows along one axis, in place of the features."""
    span = y.shape[axis] - (kernel - 1) * dilation
    starts = [k * dilation for k in range(kernel)]
    return jnp.concatenate([lax.slice_in_dim(y, s, s + span, stride, axis=axis) for s in starts], axis=-1)


def _by_group(patches: Float[Array, "images positions groups K"]) -> Float[Array, "groups rows K"]:
    return jnp.moveaxis(patches, 2, 0).reshape(patches.shape[2], -1, patches.shape[3])


def _sliding(x: Array, windows: Windows, outputs: tuple[int, ...]) -> tuple[Array, Array]:
    """H[p, q] = sum over output rows t of y[t + p] y[t + q]^T, where y[u] are the patches of input row u.

    With u = t + p it only depends on q - p, but for the first and the last rows.
    """
    rows, dilation = windows.kernel[0], windows.dilation[0]
    pairs = [(p, q) for p in range(rows) for q in range(p, rows)]
    flat = len(outputs) == 2 and windows.strides[1] == 1
    products_of = _shared_products if flat and outputs[1] >= _reach(windows) else _row_products
    x_sum = jnp.sum(x, axis=0, keepdims=True)

    def step(sums, u):
        here, total = sums
        products = products_of(x, [u + e * dilation for e in range(rows)], windows)
        # A product of rows beyond the last one is inside for no pair.
        inside = [(u >= p * dilation) & (u < p * dilation + outputs[0]) for p in range(rows)]
        here = [h + jnp.where(inside[p], products[q - p], 0) for h, (p, q) in zip(here, pairs, strict=True)]
        line = jnp.sum(_by_group(_patch_row(x_sum, u, windows)), axis=1)
        total = [t + jnp.where(inside[p], line, 0) for p, t in enumerate(total)]
        return (here, total), None

    size = math.prod(windows.kernel[1:]) * x.shape[-1]
    zero = Moments.zeros((), windows.groups, size)
    start = [zero.h] * len(pairs), [zero.total] * rows
    (here, total), _ = lax.scan(step, start, jnp.arange(outputs[0] + (rows - 1) * dilation))
    found = dict(zip(pairs, here, strict=True))
    upper = [[found[p, q] if p <= q else found[q, p].mT for q in range(rows)] for p in range(rows)]
    return jnp.block(upper), jnp.concatenate(total, axis=-1)


def _row_products(x: Array, rows: list[Array], windows: Windows) -> list[Array]:
    """sum over positions t of y[t] z[t]^T, where y are the patches of the first row and z those of each row."""
    ahead = [_by_group(_patch_row(x, row, windows)) for row in rows]
    return jnp.split(outer(ahead[0], jnp.concatenate(ahead, axis=-1)), len(rows), axis=-1)


def _reach(windows: Windows) -> int:
    """Columns from the first to the last position of a kernel row."""
    return (windows.kernel[1] - 1) * windows.dilation[1]


def _shared_products(x: Array, rows: list[Array], windows: Windows) -> list[Array]:
    """The same for planes without strides: block (a, b) is the sum over t of y[t + a] z[t + b]^T, of single columns.

    With s = t + b it only depends on a - b, but for the first and the last columns s. Those between, where every
    block has its term, are shared. Each b adds what it has at both ends.
    """
    kernel, dilation, reach = windows.kernel[1], windows.dilation[1], _reach(windows)
    lines = [lax.dynamic_index_in_dim(x, row, axis=1, keepdims=False) for row in rows]
    first, all_lines = lines[0], jnp.concatenate(lines, axis=-1)
    features, end = first.shape[-1], first.shape[1] - reach  # `end` is the number of positions t
    around = _by_group(_side_by_side(first, 2 * kernel - 1, dilation))
    shared = outer(around, _by_group(all_lines[:, reach:end]))

    # Patches at the last positions, then at the first: those that b has beside the shared ones are neighbours.
    ends = [_side_by_side(columns, kernel, dilation) for columns in (first[:, end - reach :], first[:, : 2 * reach])]
    patches = jnp.concatenate(ends, axis=1)
    blocks = []
    for b in range(kernel):
        shift, top = b * dilation, (kernel - 1 - b) * features
        columns = jnp.concatenate([all_lines[:, end : end + shift], all_lines[:, shift:reach]], axis=1)
        at_ends = outer(_by_group(patches[:, reach - shift : 2 * reach - shift]), _by_group(columns))
        blocks.append(jnp.split(shared[:, top : top + kernel * features] + at_ends, len(rows), axis=-1))
    return [jnp.concatenate(of_row, axis=-1) for of_row in zip(*blocks, strict=True)]


def _stepping(x: Array, windows: Windows, outputs: tuple[int, ...], keep: Array | None) -> tuple[Array, Array]:
    """Patches of one output row after another."""

    def step(sums, t):
        h, total = sums
        starts = [t * windows.strides[0] + k * windows.dilation[0] for k in range(windows.kernel[0])]
        patches = jnp.concatenate([_patch_row(x, start, windows) for start in starts], axis=-1)
        if keep is not None:
            kept = lax.dynamic_index_in_dim(keep, t, axis=1, keepdims=False).reshape(patches.shape[0], -1)
            patches = jnp.where(kept[:, :, None, None], patches, 0)
        rows = _by_group(patches)
        return (h + outer(rows, rows), total + jnp.sum(rows, axis=1)), None

    size = math.prod(windows.kernel) * x.shape[-1]
    start = Moments.zeros((), windows.groups, size)
    (h, total), _ = lax.scan(step, (start.h, start.total), jnp.arange(outputs[0]))
    return h, total
