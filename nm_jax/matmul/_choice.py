"""Which implementation runs a product."""

import dataclasses
import functools
import math
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nm_jax.matmul import reference
from nm_jax.matmul._compress import compress
from nm_jax.matmul._profile import Measurement, load_profile, profile_path
from nm_jax.matmul.base import Implementation, Product
from nm_jax.matmul.menu import IMPLEMENTATIONS

_HALVES = ("bfloat16", "float16")  # tensor cores multiply both at one rate
MEASURE = "run python -m experiments bench/matmul"


def choose(
    wanted: str | Implementation | None, product: Product, device: jax.Device | None = None
) -> Implementation | None:
    """The implementation that `implementation=` means for a product.

    A named one is taken, or refused with its reason. `None` takes, of the kernels that support the product on the
    device, the one expected to gain the most over the dense product, by what was measured on this kind of device
    (`Measurement.expected_gain`). Where none is, and under a mesh that the compiler partitions, it is the dense
    product; on a GPU a warning says why, once for each reason. Either way a kernel runs in the configuration that was
    measured to be the fastest at the nearest shape, where the product is not less than half of it in any size.

    Args:
      wanted: `"hopper"`, `"ampere"`, `"reference"`, an `Implementation`, or `None`.
      product: what is to be computed.
      device: where it will run; `None`: the default device.

    Returns:
      The implementation, or `None` for a dense product.

    Raises:
      ValueError: if a named implementation does not exist, cannot run the product or fails its self-check.
    """
    device = device or default_device()
    if wanted is not None:
        implementation = _named(wanted)
        if isinstance(wanted, str):
            current = [m for m in _measured(implementation, device) if m.version == implementation.version]
            if best := _nearest(current, product):
                implementation = _as_measured(implementation, best, product, device)
        if reason := _refusal(implementation, product, device):
            raise ValueError(
                f"implementation {implementation.name!r} cannot run this product on {device.device_kind}: {reason}; "
                "pass implementation=None for the best that can, or 'reference'"
            )
        return implementation
    if _partitioned():
        found = None
        reasons = ["the compiler partitions it, and would gather a kernel's operands; call it inside jax.shard_map"]
    else:
        found, reasons = _expected_to_gain(product, device)
    if found is None and is_gpu(device):
        sizes = "tokens, rows, k = " + " x ".join(map(str, product.sizes))
        warn_once(f"a product with a 2:4 weight ({sizes}) runs dense on {device.device_kind}: {'; '.join(reasons)}")
    return found


def _expected_to_gain(product: Product, device: jax.Device) -> tuple[Implementation | None, list[str]]:
    """The kernel expected to gain the most that can run, or `None` and why each is none."""
    reasons, gains = [], []
    for kernel in (i for i in IMPLEMENTATIONS if i.is_kernel):
        best, why = _expected_gain(kernel, product, device)
        if best is not None:
            gains.append((best.expected_gain(product), _as_measured(kernel, best, product, device)))
        else:
            reasons.append(f"{kernel.name}: {kernel.supports(product, device) or why}")
    for _, kernel in sorted(gains, key=lambda pair: -pair[0]):
        if (reason := _refusal(kernel, product, device)) is None:
            return kernel, []
        warn_once(f"the sparse kernel {kernel.name!r} was measured to pay but is not used: {reason}")
        reasons.append(f"{kernel.name}: {reason}")
    return None, reasons


def _expected_gain(kernel: Implementation, product: Product, device: jax.Device) -> tuple[Measurement | None, str]:
    """The measurement by which a kernel should be faster than dense, or `None` and why there is none."""
    measured = _measured(kernel, device)
    if not measured:
        return None, f"it was not measured on this device (no entry in {profile_path()}); {MEASURE}"
    current = [m for m in measured if m.version == kernel.version]
    if len(current) < len(measured):
        warn_once(
            f"{profile_path()} holds measurements of another version of the sparse kernel {kernel.name!r}, which do "
            f"not count; {MEASURE}"
        )
    if not current:
        return None, f"this version of it was not measured; {MEASURE}"
    if (best := _nearest(current, product)) is None:
        return None, f"it was not measured in {product.dtype.name}; {MEASURE}"
    if best.dtype != product.dtype.name:
        warn_once(
            f"the sparse kernel {kernel.name!r} was not measured in {product.dtype.name}, and is taken to run as "
            f"it was measured in {best.dtype}; {MEASURE}"
        )
    if best.jax != jax.__version__:
        warn_once(f"{profile_path()} was measured with jax {best.jax}, and this is {jax.__version__}; {MEASURE}")
    if (gain := best.expected_gain(product)) > 1:
        return best, ""
    shape = " x ".join(map(str, (best.tokens, best.rows, best.k)))
    return None, f"going by what was measured at {shape}, it is expected to run at {gain:.2f} times the dense speed"


def _measured(kernel: Implementation, device: jax.Device) -> list[Measurement]:
    return [m for m in load_profile() if m.device == device.device_kind and m.implementation == kernel.name]


def _nearest(current: Sequence[Measurement], product: Product) -> Measurement | None:
    """What counts for a product of all that was measured of this version of a kernel, in the dtype or, if there is
    nothing, in the other half: at the nearest shape, the configuration that promises most. Of several measurements of
    one configuration, as forward and backward, the one that promises least."""
    near = [m for m in current if m.dtype == product.dtype.name]
    if not near and product.dtype.name in _HALVES:
        near = [m for m in current if m.dtype in _HALVES]
    if not near:
        return None
    least = min(m.distance(product) for m in near)
    at = [m for m in near if m.distance(product) == least]

    def gain(measurement):
        return measurement.expected_gain(product)

    return max((min((m for m in at if m.config == config), key=gain) for config in {m.config for m in at}), key=gain)


def _as_measured(kernel: Implementation, best: Measurement, product: Product, device: jax.Device) -> Implementation:
    """The kernel in the configuration of a measurement, if that covers the product and fits it; or else as it is."""
    if best.config is None or not best.covers(product):
        return kernel
    try:
        shaped = _configured(kernel, best.config)
    except (TypeError, ValueError) as error:
        warn_once(f"{profile_path()}: {kernel.name} has no configuration {dict(best.config)} ({error}); {MEASURE}")
        return kernel
    return kernel if shaped.supports(product, device) else shaped


@functools.cache
def _configured(kernel: Implementation, settings: tuple[tuple[str, int], ...]) -> Implementation:
    """One object for each configuration, so that programs are compiled once."""
    if kernel.config is None:
        raise ValueError("it has none at all")
    config = kernel.config(**dict(settings))
    parts: Any = kernel.supports, kernel.product
    supports, product = (functools.partial(part, config=config) for part in parts)
    return dataclasses.replace(kernel, supports=supports, product=product)


def _refusal(implementation: Implementation, product: Product, device: jax.Device) -> str | None:
    """Why an implementation must not run a product, or `None`."""
    return implementation.supports(product, device) or self_check(implementation, device, product.dtype)


def self_check(implementation: Implementation, device: jax.Device, dtype) -> str | None:
    """What is wrong with an implementation on a device: `None` if it agrees with `reference` on a small product.

    Runs once per process, device and dtype, also while tracing. A device that this process cannot run on (ahead of
    time compilation) is not checked.
    """
    if not implementation.is_kernel or not _is_here(device):
        return None
    return _self_check(implementation, device, np.dtype(dtype))


def _is_here(device: jax.Device) -> bool:
    try:
        return device in jax.local_devices(backend=device.platform)
    except RuntimeError:  # this process has no device of the kind
        return False


@functools.cache
def _self_check(implementation: Implementation, device: jax.Device, dtype: np.dtype) -> str | None:
    tokens, rows, k = 256, 256, 512
    generator = np.random.default_rng(0)
    dense = generator.normal(size=(rows, k // 4, 4)).astype(np.float32)
    kept = np.argsort(generator.random(dense.shape), axis=-1) < 2
    x = generator.normal(size=(tokens, k)).astype(np.float32)
    with jax.ensure_compile_time_eval(), jax.default_device(device):
        a, _ = compress(jnp.asarray(dense.reshape(rows, k), dtype), jnp.asarray(kept.reshape(rows, k)))
        expected = np.asarray(reference.product(a, jnp.asarray(x, dtype)), np.float32)
        try:
            found = np.asarray(implementation.product(a, jnp.asarray(x, dtype)), np.float32)
        except Exception as error:  # whatever a compiler may throw
            return f"it fails on a small product: {type(error).__name__}: {error}"
    # Sums in another order differ by roundings of the result.
    allowed = 4 * float(jnp.finfo(dtype).eps) * math.sqrt(k)
    worst = float(np.max(np.abs(found - expected)))
    return None if worst <= allowed else f"it is wrong on a small product, by {worst:.3g}"


def _named(wanted: str | Implementation) -> Implementation:
    if isinstance(wanted, Implementation):
        return wanted
    for implementation in IMPLEMENTATIONS:
        if implementation.name == wanted:
            return implementation
    names = ", ".join(repr(i.name) for i in IMPLEMENTATIONS)
    raise ValueError(f"there is no implementation {wanted!r}; choose one of {names}, or None")


def default_device() -> jax.Device:
    default = jax.config.jax_default_device  # type: ignore[attr-defined]
    if isinstance(default, str):
        return jax.devices(default)[0]
    return default or jax.devices()[0]


def _partitioned() -> bool:
    """Whether the compiler partitions what is being traced; it would gather the operands of a kernel."""
    mesh = jax.sharding.get_abstract_mesh()
    return any(
        size > 1 and kind != jax.sharding.AxisType.Manual
        for size, kind in zip(mesh.axis_sizes, mesh.axis_types, strict=True)
    )


def is_gpu(device: jax.Device) -> bool:
    return device.platform in ("gpu", "cuda")


@functools.cache
def warn_once(message: str) -> None:
    """A warning that is given the first time only."""
    warnings.warn(message, stacklevel=5)
