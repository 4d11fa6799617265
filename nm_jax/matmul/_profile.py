"""What products cost on a device, as measured on it: the file that the default choice of implementation consults."""

import dataclasses
import functools
import json
import math
import os
import pathlib
from collections.abc import Sequence

from nm_jax.matmul.base import Product

ENVIRONMENT = "NM_JAX_PROFILE"


# What a sparse kernel loses of its gain when a size is halved. The gain of cuSPARSELt over cuBLAS falls from 1.53 at
# 4096 x 4096 x 4096 to 0.97 at half of each size on an H100, from 1.71 to 1.18 on an A100: by 0.18 for each halving.
LOSS_PER_HALVING = 0.2


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Median times of one product x A^T on one device, in seconds.

    Args:
      device: kind of the device, as jax names it.
      implementation: name of the sparse kernel.
      version: its version, `Implementation.version`.
      jax: version of jax.
      dtype: name of the operands' dtype.
      tokens: rows of x.
      rows: rows of A.
      k: columns of A, zeros included.
      dense: the dense product.
      sparse: the sparse product of a packed weight.
      packing: packing the weight.
      config: the configuration of the kernel that was measured, names and values; `None`: the one it chose itself.

    Examples:
      >>> import nm_jax as nm
      >>> times = {"dense": 1.0, "sparse": 0.5, "packing": 0.3}
      >>> measured = nm.matmul.Measurement("GPU", "hopper", 1, "0.12", "bfloat16", 4096, 4096, 4096, **times)
      >>> f"{measured.expected_gain(nm.matmul.Product('bfloat16', 4096, 4096, 4096)):.2f}"
      '1.25'
      >>> f"{measured.expected_gain(nm.matmul.Product('bfloat16', 4096, 4096, 4096, packed=True)):.2f}"
      '2.00'
    """

    device: str
    implementation: str
    version: int
    jax: str
    dtype: str
    tokens: int
    rows: int
    k: int
    dense: float
    sparse: float
    packing: float
    config: tuple[tuple[str, int], ...] | None = None

    def expected_gain(self, product: Product) -> float:
        """How many times faster than dense a product of this dtype should be.

        gain = dense / (sparse + packing * tokens / product.tokens) - 0.2 * halvings

        Both products are taken to grow alike; packing does not depend on tokens, and is nothing of a weight that is
        packed already. `halvings`, the sum of log2(measured / asked) over the sizes that are smaller than measured,
        is what small products lose; larger ones are trusted to gain as much. At the shape measured it is what was
        measured.
        """
        packing = 0.0 if product.packed else self.packing * self.tokens / product.tokens
        halvings = sum(max(ratio, 0.0) for ratio in self._ratios(product))
        return self.dense / (self.sparse + packing) - LOSS_PER_HALVING * halvings

    def distance(self, product: Product) -> float:
        """How far the shape of a product is: the sum of |log2| of the ratios of sizes."""
        return sum(map(abs, self._ratios(product)))

    def covers(self, product: Product) -> bool:
        """Whether a product is at least half as large as this one in every size: what is best for one should be good
        for the other."""
        return max(self._ratios(product)) <= 1

    def _ratios(self, product: Product) -> list[float]:
        own = (self.tokens, self.rows, self.k)
        return [math.log2(mine / asked) for mine, asked in zip(own, product.sizes, strict=True)]


def profile_path() -> pathlib.Path:
    """The file of measurements: `$NM_JAX_PROFILE`, or `matmul.json` in the user's cache folder for nm_jax.

    Examples:
      >>> import nm_jax as nm
      >>> nm.matmul.profile_path().suffix
      '.json'
    """
    if named := os.environ.get(ENVIRONMENT):
        return pathlib.Path(named)
    cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(cache) / "nm_jax" / "matmul.json"


def save_profile(measurements: Sequence[Measurement], path: str | os.PathLike | None = None) -> pathlib.Path:
    """Write measurements where the default choice finds them; those of other devices in the file stay.

    Args:
      measurements: of one or several devices; each replaces what the file has about its device.
      path: the file; `None`: `profile_path()`.

    Returns:
      The path written to.

    Examples:
      >>> import pathlib, tempfile
      >>> import nm_jax as nm
      >>> m = nm.matmul.Measurement("GPU", "hopper", 1, "0.12", "bfloat16", 4096, 4096, 4096, 1.0, 0.5, 0.3)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = nm.matmul.save_profile([m], pathlib.Path(folder) / "matmul.json")
      ...     nm.matmul.load_profile(path) == (m,)
      True
    """
    path = pathlib.Path(path) if path is not None else profile_path()
    devices = {m.device for m in measurements}
    kept = [m for m in load_profile(path) if m.device not in devices]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([dataclasses.asdict(m) for m in (*kept, *measurements)], indent=1) + "\n")
    return path


def load_profile(path: str | os.PathLike | None = None) -> tuple[Measurement, ...]:
    """The measurements in a file; none where it does not exist.

    Args:
      path: the file; `None`: `profile_path()`.

    Returns:
      What was measured, of all devices.

    Raises:
      ValueError: if the file is not one that `save_profile` wrote.

    Examples:
      >>> import nm_jax as nm
      >>> nm.matmul.load_profile("no/such/file.json")
      ()
    """
    path = pathlib.Path(path) if path is not None else profile_path()
    try:
        return _read(path, path.stat().st_mtime_ns)
    except FileNotFoundError:
        return ()


@functools.lru_cache(maxsize=8)
def _read(path: pathlib.Path, modified: int) -> tuple[Measurement, ...]:
    del modified  # part of the key: a file that changed is read again
    try:
        return tuple(Measurement(**_tuples(entry)) for entry in json.loads(path.read_text()))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is no profile of products ({error}); delete it and measure again") from error


def _tuples(entry: dict) -> dict:
    """An entry as it was before it was JSON, which has lists."""
    config = entry.get("config")
    return entry if config is None else entry | {"config": tuple((name, value) for name, value in config)}
