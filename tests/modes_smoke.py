"""The whole public API, once, in one process under one configuration of JAX.

    python -m tests.modes_smoke MODE [SECTION ...]

Sections are functions by subject. Each prints its line, whatever the others do; the exit status says whether one
failed. Checks are NumPy's: what a mode could change is dtypes and whether a program runs at all.
"""

import contextlib
import pathlib
import sys
import tempfile
import traceback

import jax
import jax.numpy as jnp
import numpy as np
import optax

import nm_jax as nm
from tests.helpers import check_mask, worst_group

MODES = {
    "optimised": {},  # python -OO: no assertions, no docstrings
    "x64": {"jax_enable_x64": True},
    "disable_jit": {"jax_disable_jit": True},
    "strict": {"jax_numpy_dtype_promotion": "strict", "jax_numpy_rank_promotion": "raise"},
    "debug": {"jax_debug_nans": True, "jax_debug_infs": True},
    "leaks": {"jax_check_tracer_leaks": True},
}
PATTERNS = ["2:4", "4:8-S", "US-0.5", "2:4-T"]
RULES = [(f"^{pattern}$", pattern, "io") for pattern in PATTERNS]


def holds(condition, what=None):
    """An `assert` that Python's `-O` does not remove."""
    if not condition:
        raise AssertionError(what)


def draw(*shape, dtype=np.float32, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32)).astype(dtype)


def weights(second=np.float32):
    """A weight for every pattern, of two dtypes in turn."""
    kernels = {p: draw(8, 8, dtype=second if k % 2 else np.float32, seed=k) for k, p in enumerate(PATTERNS)}
    return kernels | {"bias": jnp.zeros(8)}


def close(a, b, tolerance=1e-4):
    np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------------------------------------------- solvers, masks


def solvers():
    scores = jnp.abs(draw(8, 8))
    for pattern, solver in [
        ("2:4", None),
        (nm.SequentialNM(4, 8), None),
        (nm.Unstructured(0.5), None),
        ("2:4-T", None),
        (nm.TransposableNM(2, 4, at_most=True), None),
        ("4:8-T", nm.solvers.Greedy()),
        ("4:8-T", nm.solvers.MinCostFlow()),
        ("2:4-T", nm.solvers.IntegerProgram()),
    ]:
        mask = nm.solve(scores, pattern, solver)
        holds(mask.dtype == bool and check_mask(mask, nm.parse_pattern(pattern)), (pattern, solver))
    for dtype in [jnp.bfloat16, *[jnp.float64] * jax.config.jax_enable_x64]:
        holds(check_mask(nm.solve(scores.astype(dtype), "2:4"), nm.parse_pattern("2:4")), dtype)
    holds(nm.mask_diversity("2:4-T", (4, 4)) == 144)


def masks():
    params = weights(jnp.bfloat16)
    found, report = nm.compute_masks(params, RULES, return_report=True)
    holds(report.ok and "bias" in str(report))
    for pattern in PATTERNS:
        holds(check_mask(found[pattern], nm.parse_pattern(pattern)))
    sparse = nm.apply_masks(params, found)
    holds(nm.verify(sparse, RULES, dense=params).ok)
    holds(not nm.verify(params, RULES).ok)
    holds(nm.compute_masks({"w": draw(7, 8)}, [("w", "2:4", "io")], partial="pad")["w"].shape == (7, 8))


# ----------------------------------------------------------------------------------------------------------- training


def training():
    inner = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.02, momentum=0.9))
    tx = nm.sparse_training(inner, RULES, refresh_every=2)
    params = weights(jnp.bfloat16)
    state = tx.init(params)
    params = nm.sparse_params(state, params)
    x = draw(8, 8, seed=9)

    def loss(params, x):
        for kernel in (params[pattern] for pattern in PATTERNS):
            x = jnp.tanh(x.astype(kernel.dtype) @ kernel).astype(x.dtype) + jnp.broadcast_to(params["bias"], x.shape)
        return jnp.mean(jnp.square(x))

    @jax.jit
    def step(params, state, x):
        updates, state = tx.update(jax.grad(loss)(params, x), state, params)
        return optax.apply_updates(params, updates), state

    # A step moves nothing between host and device; without `jit` its constants are moved.
    with contextlib.nullcontext() if jax.config.jax_disable_jit else jax.transfer_guard("disallow"):
        for _ in range(3):
            params, state = step(params, state, x)
    holds(nm.verify(params, RULES).ok)
    holds([params[pattern].dtype for pattern in PATTERNS[:2]] == [jnp.float32, jnp.bfloat16])
    stats = nm.refresh_stats(state)
    holds(not stats.nan.any() and (stats.drift < 0.02).all())
    holds(all(nm.dense_params(state, params)[pattern].dtype == jnp.float32 for pattern in PATTERNS))
    close(nm.apply_masks(params, nm.masks(state, params))["2:4"], params["2:4"])
    nm.with_params(state, params)


def training_around():
    params = {"a": {"kernel": draw(8, 8)}, "b": {"kernel": draw(8, 8, dtype=jnp.bfloat16)}}
    # Not Adam, nor MultiSteps: optax's own arithmetic on step counts needs dtype promotion.
    for tx in (
        nm.sparse_training(optax.sgd(0.1), "2:4", refresh_every=None),
        nm.sparse_training(optax.sgd(0.1), "2:4", refresh_every=1, begin_step=1, end_step=2),
        nm.sparse_training(optax.sgd(0.1), "2:4", decay=nm.GradientDecay(1e-3)),
        nm.sparse_training(optax.sgd(0.1), "2:4", decay=nm.StepDecay(1.0)),
        nm.sparse_training(
            optax.sgd(0.1), "2:4", refresh_every=optax.constant_schedule(2), begin_step=1, end_when_settled=0.1
        ),
        nm.sparse_training(optax.sgd(0.1), "2:4", refresh_every=1, earlier=[(1, "3:4")]),
        nm.recipes.paper(optax.sgd(0.1), "2:4"),
        nm.recipes.fixed_mask(optax.sgd(0.1), "2:4"),
        nm.recipes.maximal_update(optax.sgd(0.1), "2:4"),
        optax.apply_if_finite(nm.sparse_training(optax.sgd(0.1), "2:4"), 2),
        optax.multi_transform(
            {"a": nm.sparse_training(optax.sgd(0.1), "2:4"), "b": optax.sgd(0.1)}, {"a": "a", "b": "b"}
        ),
    ):
        state = tx.init(params)
        updates, state = jax.jit(tx.update)(params, state, params)
        optax.apply_updates(params, updates)
        holds(nm.masks(state, params)["a"]["kernel"].dtype == bool)

    def probe(tx):
        return jax.jit(tx.update)(params, tx.init(params), params)[1]

    settings = {"strengths": (1.0,), "between": (0.0, 1.0), "refresh_every": 1}
    holds(nm.choose_decay(probe, optax.sgd(0.1), "2:4", found={"dense": 1.0}, **settings) == nm.GradientDecay(1.0))


def gradient_rules():
    for dtype in (np.float32, jnp.bfloat16):
        weight = draw(8, 8, dtype=dtype)
        mask = nm.solve(jnp.abs(weight), "2:4")
        for rule in (nm.ste, nm.sr_ste):
            holds(jax.grad(lambda w, rule=rule, mask=mask: jnp.sum(rule(w, mask)))(weight).dtype == weight.dtype)
        holds(nm.sr_ste_term(weight, mask).dtype == weight.dtype)
        scale = nm.s_ste_scale(weight)
        holds(jax.grad(lambda w, scale=scale: jnp.sum(nm.s_ste(w, scale)))(weight).dtype == weight.dtype)


# ---------------------------------------------------------------------------------------------------------- the model


def apply(params, x):
    hidden = jnp.tanh(x @ params["in"]["kernel"] + jnp.broadcast_to(params["in"]["bias"], (x.shape[0], 16)))
    hidden = jnp.tanh(hidden @ params["mid"]["kernel"] + jnp.broadcast_to(params["mid"]["bias"], (x.shape[0], 16)))
    return hidden @ params["out"]["kernel"]


def network(dtype=np.float32):
    return {
        "in": {"kernel": draw(8, 16, dtype=dtype), "bias": jnp.zeros(16, dtype)},
        "mid": {"kernel": draw(16, 16, dtype=dtype, seed=1), "bias": jnp.zeros(16, dtype)},
        "out": {"kernel": draw(16, 4, dtype=dtype, seed=2)},
    }


def model():
    params, x = network(), draw(32, 8, seed=3)
    plan = nm.plan(apply, params, x, pattern="2:4-T")
    holds(plan["mid/kernel"].axes == "io" and plan["out/kernel"].pattern is None and "FLOPs" in str(plan))
    holds(nm.Plan.from_json(plan.to_json()) == plan)
    holds(nm.trace(apply, params, x)["mid/kernel"].axes == "io")
    tx = nm.sparse_training(optax.sgd(0.1), plan)
    holds(nm.masks(tx.init(params))["out"]["kernel"] is None)


# ------------------------------------------------------------------------------------------------------ reconstruction


def reconstruction():
    weight, x = draw(16, 8), draw(64, 16, seed=1)
    gram = nm.Gram.from_inputs(x)
    mask = nm.solve(jnp.abs(weight), "2:4")
    found = nm.reconstruct(weight, gram, mask, bias=jnp.zeros(8, weight.dtype))
    holds(found.weight.dtype == jnp.float32 and float(found.after) <= float(found.before))
    holds(float(nm.output_error(weight, found.weight, gram)) >= 0)
    for scores in (nm.wanda(weight, gram), nm.obc(weight, gram)):
        holds(scores.dtype == jnp.float32 and scores.shape == weight.shape)
    close(np.asarray(nm.absorb_mean(weight, mask, "2:4"))[~np.asarray(mask)], 0)
    better = nm.refine_mask(weight, gram, mask, "2:4", rounds=2)
    holds(float(better.after) <= float(better.before) and worst_group(better.mask, 0, 4) == 2)


def whole_networks():
    params, x = network(), draw(64, 8, seed=3)
    rules = [("mid/kernel", "2:4-T", "io")]
    grams = nm.gram(apply, params, [x])
    scores = nm.score_tree(nm.wanda, params, grams)
    found = nm.compute_masks(params, rules, scores=scores)
    pruned, report = nm.adaprune(apply, params, found, [x])
    holds(worst_group(pruned["mid"]["kernel"], 0, 4) == 2 and str(report))
    nm.reconstruct_layers(params, found, grams)
    refined, swaps = nm.refine_masks(params, found, rules, grams, rounds=2)
    holds(worst_group(refined["mid"]["kernel"], 0, 4) == 2 and swaps["mid/kernel"] is not None)
    fitted, blocks = nm.fit_blocks(apply, params, nm.apply_masks(params, found), found, [x], boundaries=[], steps=2)
    holds(worst_group(fitted["mid"]["kernel"], 0, 4) == 2 and blocks.blocks)
    converted, conversion = nm.convert(apply, params, rules, [x])
    holds(conversion.check.ok and worst_group(converted["mid"]["kernel"], 1, 4) == 2 and str(conversion))
    holds(nm.verify(nm.apply_masks(params, nm.fit_masks(params, rules)), rules).ok)
    holds(nm.pattern_violations(params, rules)[0].leaf.path == "mid/kernel")
    sparse = nm.apply_masks(params, nm.compute_masks(params, [("mid/kernel", "US-0.95", "io")]))
    holds([rule[1] for rule in nm.choose_patterns(sparse, rules, 50)] == [nm.NM(1, 8)])
    holds(0 < nm.violation_probability(2, 4, 0.5) < 1)


def permutation():
    for pattern in ("2:4", "2:4-T"):
        found = nm.find_permutation(jnp.abs(draw(8, 8)), pattern)
        holds(found.after >= found.before and sorted(np.asarray(found.inputs)) == list(range(8)), pattern)
    params, x = network(), draw(32, 8, seed=3)
    permuted, report = nm.permute(apply, params, x, pattern="2:4")
    close(apply(permuted, x), apply(params, x))
    holds(report.layers and str(report))


def batch_norm():
    def update(stats, x):
        return {"mean": 0.9 * stats["mean"] + 0.1 * x.mean(0), "var": 0.9 * stats["var"] + 0.1 * x.var(0)}

    stats, x = {"mean": 0 * draw(8), "var": 0 * draw(8)}, draw(32, 8)
    tuned = nm.tune_batch_norm(jax.jit(update), stats, [x[:16], x[16:]])
    holds(tuned["var"].dtype == jnp.float32)
    close(tuned["mean"], np.asarray(x).mean(0))
    close(tuned["var"], np.asarray(x).var(0))


# ----------------------------------------------------------------------------------------------------------- products


def products():
    for dtype in (np.float32, jnp.bfloat16):
        weight, x = draw(16, 16, dtype=dtype), draw(8, 16, dtype=dtype, seed=1)
        sparse = nm.apply_masks({"w": weight}, nm.compute_masks({"w": weight}, [("w", "2:4-T", "io")]))["w"]
        expected = np.asarray(x, np.float32) @ np.asarray(sparse, np.float32)
        packed = nm.pack(sparse)
        close(nm.unpack(packed), sparse)
        close(nm.unpack(nm.repack(packed, 2 * sparse)), 2 * sparse)
        for product in (nm.nm_matmul(x, sparse), nm.nm_matmul(x, packed)):
            holds(product.dtype == x.dtype)
            close(product, expected, 0.1 if dtype == jnp.bfloat16 else 1e-4)
        gradient = jax.jit(jax.grad(lambda w, x=x: jnp.sum(nm.nm_matmul(x, w))))(sparse)
        holds(gradient.dtype == weight.dtype)
        close(nm.dot_general()(x, sparse, (((1,), (0,)), ((), ()))), expected, 0.1)
        close(nm.einsum()("bi,io->bo", x, sparse), expected, 0.1)
    kernel, images = draw(3, 3, 16, 16), draw(2, 4, 4, 16, seed=1)
    sparse = nm.apply_masks({"w": kernel}, nm.compute_masks({"w": kernel}, [("w", "2:4-T", "bbio")]))["w"]
    sizes = {"window_strides": (1, 1), "padding": "SAME", "dimension_numbers": ("NHWC", "HWIO", "NHWC")}
    product = nm.conv_general_dilated()(images, sparse, **sizes)
    close(product, jax.lax.conv_general_dilated(images, sparse, **sizes), 1e-3)


def packing_once():
    params, x = {"w": draw(16, 16)}, draw(8, 16, seed=1)
    tx = nm.sparse_training(optax.sgd(0.1), [("w", "2:4-T", "io")], refresh_every=1, packed=True)
    state = tx.init(params)
    params = nm.sparse_params(state, params)
    for _ in range(2):
        packed = nm.pack_params(state, params)

        def loss(params, packed=packed):
            return jnp.sum(nm.nm_matmul(x, nm.attach(params, packed)["w"], implementation="reference"))

        close(loss(params), np.sum(np.asarray(x) @ np.asarray(params["w"])), 1e-3)
        gradients = jax.jit(jax.grad(loss))(params)
        close(gradients["w"], np.repeat(np.asarray(x).sum(0)[:, None], 16, axis=1))
        updates, state = jax.jit(tx.update)(gradients, state, params)
        params = optax.apply_updates(params, updates)


# -------------------------------------------------------------------------------------------------------- checkpoints


def checkpoints():
    params = network()
    rules = [("mid/kernel", "2:4-T", "io"), ("in/kernel", "4:8-T", "io")]
    with tempfile.TemporaryDirectory() as folder:
        dense, sparse = pathlib.Path(folder, "dense.safetensors"), pathlib.Path(folder, "sparse.safetensors")
        packed = pathlib.Path(folder, "packed.safetensors")
        found = nm.compute_masks(params, rules)
        nm.save_checkpoint(sparse, nm.apply_masks(params, found), rules)
        nm.save_checkpoint(packed, nm.apply_masks(params, found), rules, packed=True)
        for path in (sparse, packed):
            loaded, _ = nm.load_checkpoint(path, like=params)
            close(loaded["mid"]["kernel"], nm.apply_masks(params, found)["mid"]["kernel"])
        holds(nm.verify_checkpoint(sparse).ok)
        nm.save_checkpoint(dense, params, [("mid/kernel", None)])
        scores = {"mid.kernel": np.asarray(jnp.abs(params["mid"]["kernel"]))}
        nm.save_scores(pathlib.Path(folder, "scores"), scores)
        for k, pattern in enumerate(PATTERNS):
            out = pathlib.Path(folder, f"pruned{k}.safetensors")
            rules = [("mid/kernel", pattern, "io")]
            report = nm.prune_checkpoint(dense, out, rules, scores=pathlib.Path(folder, "scores"), packed=k % 2 == 0)
            holds(report.ok and nm.verify_checkpoint(out).ok, pattern)
            loaded = nm.load_checkpoint(out, like=params)[0]["mid"]["kernel"]
            holds(check_mask(loaded != 0, nm.parse_pattern(pattern)), pattern)


SECTIONS = [
    solvers,
    masks,
    training,
    training_around,
    gradient_rules,
    model,
    reconstruction,
    whole_networks,
    permutation,
    batch_norm,
    products,
    packing_once,
    checkpoints,
]


def main(mode: str, *only: str) -> int:
    """How many sections fail under a mode; all, or those named."""
    for name, value in MODES[mode].items():
        jax.config.update(name, value)
    failed = 0
    for section in SECTIONS:
        if only and section.__name__ not in only:
            continue
        try:
            section()
            print(f"{section.__name__}: ok", flush=True)
        except Exception:
            failed += 1
            print(f"{section.__name__}: FAILED under {mode}\n{traceback.format_exc()}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
