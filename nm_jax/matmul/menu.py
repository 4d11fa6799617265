"""The implementations of a sparse product, and the choice of one."""

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from nm_jax.matmul import ampere, hopper, reference
from nm_jax.matmul._packing import SparseMatrix, compress
from nm_jax.matmul._profile import load_profile, profile_path


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to run a sparse product.

    To add one: write a file with `supports` and `product`, add a line to `IMPLEMENTATIONS`; the contract suite of the
    tests then covers it.

    Args:
      name: what `implementation=` calls it.
      supports: (dtype, tokens, rows, k, device) -> `None` if it can run the product, or the reason why not. Traces
        nothing.
      product: (A, x) -> x A^T, accumulated in float32, in the dtype of x.
      self_check: compare it with `reference` on a small product, once per process, device and dtype, before its first
        use.
    """

    name: str
    supports: Callable[..., str | None]
    product: Callable[[SparseMatrix, Float[Array, "tokens k"]], Float[Array, "tokens rows"]]
    self_check: bool = True


REFERENCE = Implementation("reference", reference.supports, reference.product, self_check=False)
IMPLEMENTATIONS = (
    Implementation("hopper", hopper.supports, hopper.product),
    Implementation("ampere", ampere.supports, ampere.product),
    REFERENCE,
)


@dataclasses.dataclass(frozen=True)
class Product:
    """A product x A^T to find an implementation for.

    Args:
      dtype: dtype of the operands.
      tokens: rows of x.
      rows: rows of A.
      k: columns of A.
      packed: whether A is packed already, so that packing costs nothing.
    """

    dtype: np.dtype
    tokens: int
    rows: int
    k: int
    packed: bool = False

    @property
    def arguments(self):
        return self.dtype, self.tokens, self.rows, self.k


def choose(
    wanted: str | Implementation | None, product: Product, device: jax.Device | None = None
) -> Implementation | None:
    """The implementation that `implementation=` means for a product.

    A named one is taken, or refused with its reason. `None` takes, of the kernels that support the device, the dtype,
    the shape and this version of jax, the one that was measured to gain the most over the dense product, packing
    included unless the weight is packed already. What counts is the nearest shape measured on this kind of device,
    no dimension of which may differ by more than a factor of two. Where no kernel was measured to gain, and under a
    mesh that the compiler partitions, it is the dense product.

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
        if reason := implementation.supports(*product.arguments, device) or self_check(
            implementation, device, product.dtype
        ):
            raise ValueError(
                f"implementation {implementation.name!r} cannot run this product on {device.device_kind}: {reason}; "
                "pass implementation=None for the best that can, or 'reference'"
            )
        return implementation
    if _partitioned():
        return None
    for implementation in _measured_to_gain(product, device):
        reason = implementation.supports(*product.arguments, device)
        if reason is None:
            reason = self_check(implementation, device, product.dtype)
        if reason is None:
            return implementation
        _warn_once(f"the sparse kernel {implementation.name!r} was measured to pay but is not used: {reason}")
    if is_gpu(device) and not _profile_of(device):
        _warn_unmeasured(device)
    return None


def self_check(implementation: Implementation, device: jax.Device, dtype) -> str | None:
    """What is wrong with an implementation on a device: `None` if it agrees with `reference` on a small product.

    Runs once per process, device and dtype, also while tracing. A device that this process cannot run on (ahead of
    time compilation) is not checked.
    """
    if not implementation.self_check or not _is_here(device):
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


def _measured_to_gain(product: Product, device: jax.Device) -> list[Implementation]:
    """The kernels that beat the dense product at the nearest measured shape (of equally near ones, at the one where
    they gain least), the best first."""
    gains = []
    for implementation in IMPLEMENTATIONS:
        near = [
            (m.distance(product.tokens, product.rows, product.k), m.gain(product.packed))
            for m in _profile_of(device)
            if m.implementation == implementation.name and m.dtype == np.dtype(product.dtype).name
        ]
        distance, gain = min(near, default=(math.inf, 0.0))
        if distance < math.inf and gain > 1:
            gains.append((gain, implementation))
    return [implementation for _, implementation in sorted(gains, key=lambda pair: -pair[0])]


def _profile_of(device: jax.Device):
    return [m for m in load_profile() if m.device == device.device_kind]


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


def _warn_unmeasured(device: jax.Device) -> None:
    """Say once why nothing runs sparse on this GPU."""
    reasons = {i.name: i.supports(np.dtype(jnp.bfloat16), 4096, 4096, 4096, device) for i in IMPLEMENTATIONS[:-1]}
    if None in reasons.values():
        why = f"no kernel was measured on it (no entry in {profile_path()}); run experiments/bench/matmul.py"
    else:
        why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    _warn_once(f"products with 2:4 weights run dense on {device.device_kind}: {why}")


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=3)
