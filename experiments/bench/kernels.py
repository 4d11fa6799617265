"""How one sparse kernel is checked, and timed against the dense product."""

import functools
import importlib.util
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

import nm_jax as nm
from experiments.bench.masks import all_pairs, transposable

Side = Literal["forward", "backward"]
Shape = tuple[int, int, int]  # tokens, rows (outputs), k (inputs)
MATRICES = (((1,), (0,)), ((), ()))  # dimension numbers of a plain product


def described(raised: Exception) -> str:
    """An exception as a result holds it."""
    return f"{type(raised).__name__}: {raised}"[:500]


# -------------------------------------------------------------------------------------------------------------- checks


def poison(shape: tuple[int, ...], dtype) -> None:
    """Leaves NaN in the memory that the next output of this size is likely to get."""
    blocks = [jnp.full(shape, jnp.nan, dtype) for _ in range(4)]
    jax.block_until_ready(blocks)


def error(found: jax.Array, truth: np.ndarray, terms: int) -> float:
    """Largest error in units of what rounding explains: 1 or less is right, NaN is wrong."""
    eps, single = float(jnp.finfo(found.dtype).eps), float(jnp.finfo(jnp.float32).eps)
    allowed = eps * np.abs(truth) + terms * single * max(1.0, float(np.abs(truth).max()))
    worst = float(np.max(np.abs(np.asarray(found, np.float64) - truth) / allowed))
    return worst if worst == worst else float("inf")


def check(kernel: nm.matmul.Implementation, seed: int, shapes: Sequence[Shape]) -> dict[str, float | str]:
    """Errors of one implementation, in units of what rounding explains; what raises is the text of its exception."""
    rng = np.random.default_rng(seed)
    errors: dict[str, float | str] = {}
    for shape in shapes:
        for dtype in (jnp.bfloat16, jnp.float16):
            for part in (_check_pairs, _check_layer):
                name = f"{' x '.join(map(str, shape))} {jnp.dtype(dtype).name}"
                try:
                    errors |= {f"{what}, {name}": value for what, value in part(kernel, rng, shape, dtype).items()}
                except Exception as raised:  # whatever a compiler or a device may throw
                    errors[f"{part.__name__.strip('_')}, {name}"] = described(raised)
    return errors


def _check_pairs(kernel, rng, shape: Shape, dtype) -> dict[str, float]:
    """All pairs of patterns, what is pruned NaN."""
    tokens, rows, k = shape
    x, w = (jnp.asarray(rng.normal(size=sizes), dtype) for sizes in ((tokens, k), (k, rows)))
    mask = all_pairs(rng, k, rows)
    packed = nm.pack(jnp.where(mask, w, jnp.nan), jnp.asarray(mask), orientation="forward")
    poison((tokens, rows), dtype)
    y = nm.nm_matmul(x, packed, "2:4", implementation=kernel)
    return {"all pairs": error(y, np.asarray(x, np.float64) @ np.where(mask, np.asarray(w, np.float64), 0), k)}


def _check_layer(kernel, rng, shape: Shape, dtype) -> dict[str, float]:
    """`nm.dot_general` and its gradients, with a transposable mask."""
    tokens, rows, k = shape
    sizes = ((tokens, k), (k, rows), (tokens, rows))
    x, w, dy = (jnp.asarray(rng.normal(size=size), dtype) for size in sizes)
    w = jnp.where(transposable(rng, k, rows), w, 0)
    layer = functools.partial(nm.dot_general("2:4-T", implementation=kernel), dimension_numbers=MATRICES)
    poison((tokens, k), dtype)
    y, pull = jax.vjp(layer, x, w)
    to_x, to_w = pull(dy)
    wide_x, wide_w, wide_dy = (np.asarray(a, np.float64) for a in (x, w, dy))
    return {
        "dot_general": error(y, wide_x @ wide_w, k),
        "input gradient": error(to_x, wide_dy @ wide_w.T, rows),
        "weight gradient": error(to_w, wide_x.T @ wide_dy, tokens),
    }


def wrong(errors: dict[str, float | str]) -> dict[str, float | str]:
    """The checks that failed; NaN, infinity and an exception count as failed."""
    return {name: value for name, value in errors.items() if isinstance(value, str) or not value <= 1}


# --------------------------------------------------------------------------------------------------------------- speed


def medians(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each, taken in turns so that the clock of the device hits all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    inner = {}
    for name, function in functions.items():
        jax.block_until_ready(function())
        start = time.perf_counter()
        jax.block_until_ready(function())
        inner[name] = max(1, min(20, int(5e-3 / (time.perf_counter() - start))))  # about 5 ms in a row
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            for _ in range(inner[name]):
                result = function()
            jax.block_until_ready(result)
            seconds[name].append((time.perf_counter() - start) / inner[name])
    return {name: float(np.median(values)) for name, values in seconds.items()}


@functools.lru_cache(maxsize=2)
def _mask(k: int, rows: int) -> np.ndarray:
    return transposable(np.random.default_rng(0), k, rows)


@functools.lru_cache(maxsize=1)
def _operands(shape: Shape, side: Side, dtype: str) -> tuple[jax.Array, jax.Array]:
    """(weight, x) of a product x A^T: A is W^T of a weight W (k, rows) forward, and the weight (rows, k) itself in the
    gradient."""
    tokens, rows, k = shape
    mask = _mask(k, rows) if side == "forward" else _mask(rows, k)
    keys = jax.random.split(jax.random.key(0))
    w = jnp.where(mask, jax.random.normal(keys[0], mask.shape, dtype), 0)
    return w, jax.random.normal(keys[1], (tokens, k), dtype)


@functools.partial(jax.jit, static_argnums=1)
def _pack(w: jax.Array, side: Side) -> nm.matmul.SparseMatrix:
    return getattr(nm.pack(w, orientation=side), side).matrix


def bench_product(kernel: nm.matmul.Implementation, shape: Shape, side: Side, dtype: str, repeats: int) -> dict:
    """Times of a product, dense, packed, and packing included."""
    weight, x = _operands(shape, side, dtype)
    packed = _pack(weight, side)
    product = jax.jit(kernel.product)
    both = jax.jit(lambda w, x: kernel.product(_pack(w, side), x))
    dot = jax.jit(lambda w, x: jnp.dot(x, w if side == "forward" else w.T))
    functions = {
        "dense": lambda: dot(weight, x),
        "sparse": lambda: product(packed, x),
        "packing": lambda: _pack(weight, side),
        "sparse and packing": lambda: both(weight, x),
    }
    return {"seconds": medians(functions, repeats)}


def bench_configuration(
    product: Callable[[Any, jax.Array], jax.Array], shape: Shape, dtype: str, repeats: int
) -> dict[str, float]:
    """Is a configuration of a kernel right, and how fast? Against the dense product of the same device in float32."""
    weight, x = _operands(shape, "backward", dtype)
    packed = _pack(weight, "backward")
    run = jax.jit(product)
    worst = error(run(packed, x), _truth(shape, dtype), shape[2])
    dot = jax.jit(lambda w, x: jnp.dot(x, w.T))
    return {"error": worst, **medians({"dense": lambda: dot(weight, x), "sparse": lambda: run(packed, x)}, repeats)}


@functools.lru_cache(maxsize=1)
def _truth(shape: Shape, dtype: str) -> np.ndarray:
    weight, x = _operands(shape, "backward", dtype)
    exact = jax.jit(functools.partial(jnp.dot, precision="highest"))
    return np.asarray(exact(x.astype(jnp.float32), weight.T.astype(jnp.float32)), np.float64)


def bench_cusparselt(shape: Shape, side: Side, dtype: str, repeats: int) -> dict[str, float]:
    """torch's cuSPARSELt at the same product, after its own search for an algorithm; empty without it."""
    if importlib.util.find_spec("torch") is None:
        return {}
    import torch

    if not (torch.cuda.is_available() and torch.backends.cusparselt.is_available()):
        return {}
    weight, x = (np.array(a, np.float32) for a in _operands(shape, side, dtype))
    half = getattr(torch, dtype)
    a = torch.from_numpy(np.ascontiguousarray(weight.T if side == "forward" else weight)).cuda().to(half)
    right = torch.from_numpy(x).cuda().to(half)
    packed = torch._cslt_compress(a)
    algorithm = torch._cslt_sparse_mm_search(packed, right.t())
    found = torch._cslt_sparse_mm(packed, right.t(), alg_id=algorithm).float()
    truth = a.float() @ right.float().t()
    seconds = []
    for _ in range(repeats + 3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(10):
            torch._cslt_sparse_mm(packed, right.t(), alg_id=algorithm)
        torch.cuda.synchronize()
        seconds.append((time.perf_counter() - start) / 10)
    return {
        "seconds": float(np.median(seconds[3:])),
        "relative error": float((found - truth).abs().max() / truth.abs().max()),
    }


def bench_training_step(kernel: nm.matmul.Implementation, sizes: tuple[int, int, int], repeats: int) -> dict:
    """Value and gradients of a transformer's MLP, dense and sparse, in the same run."""
    tokens, width, hidden = sizes
    rng = np.random.default_rng(0)
    params = {}
    for name, (k, rows) in {"up": (width, hidden), "down": (hidden, width)}.items():
        w = rng.normal(size=(k, rows)).astype(np.float32) * _mask(k, rows) * (2 / k) ** 0.5
        params[name] = jnp.asarray(w, jnp.bfloat16)
    x = jnp.asarray(rng.normal(size=(tokens, width)), jnp.bfloat16)

    def step(dot_general):
        def loss(params, x):
            y = x + dot_general(jax.nn.gelu(dot_general(x, params["up"], MATRICES)), params["down"], MATRICES)
            return jnp.mean(jnp.square(y.astype(jnp.float32)))

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))

    dense, sparse = step(jax.lax.dot_general), step(nm.dot_general("2:4-T", implementation=kernel))
    seconds = medians({"dense": lambda: dense(params, x), "sparse": lambda: sparse(params, x)}, repeats)
    return {"tokens": tokens, "width": width, "hidden": hidden, "seconds": seconds}


def bench_default(shape: tuple[int, int, int], repeats: int) -> dict:
    """Where no kernel runs: the default against a plain product, and what `reference` and packing cost."""
    tokens, rows, k = shape
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(tokens, k)), jnp.float32)
    w = jnp.asarray(rng.normal(size=(k, rows)) * _mask(k, rows), jnp.float32)

    def step(product):
        return jax.jit(jax.grad(lambda x, w: jnp.sum(jnp.square(product(x, w))), (0, 1)))

    plain, default = step(jnp.dot), step(nm.nm_matmul)
    reference = step(functools.partial(nm.nm_matmul, implementation="reference"))
    pack = jax.jit(nm.pack)
    seconds = medians(
        {
            "plain": lambda: plain(x, w),
            "default": lambda: default(x, w),
            "reference": lambda: reference(x, w),
            "packing": lambda: pack(w),
        },
        repeats,
    )
    return {"tokens": tokens, "rows": rows, "k": k, "seconds": seconds}
