"""The channels of a whole model in an order in which its pattern keeps more, its outputs unchanged."""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PyTree

from nm_jax._core.axes import Tiling
from nm_jax._core.patterns import Pattern, parse_pattern
from nm_jax._core.rules import LeafRules, SparseLeaf, resolve
from nm_jax._core.tables import aligned, row_of, shape_text
from nm_jax._masks.trees import leaves_by_path
from nm_jax._model._compiled import Skeleton, evaluation
from nm_jax._model.channels import Part, order, places, product, wholes, wiring
from nm_jax._model.plan import plan
from nm_jax._reconstruct._gains import Channels
from nm_jax._reconstruct._permutation import improved

Orders: TypeAlias = dict[Part, Int[np.ndarray, " size"]]
_ENOUGH = 1e-4  # a round that adds less than this to the share that is kept is the last
_ROUNDING = 1e-6  # of a share, which depends on the order in which it is summed
_AGREE = 1e-5  # outputs in float32, relative to them


@dataclasses.dataclass(frozen=True)
class ChannelGroup:
    """Dimensions of parameters that must be permuted together.

    Attributes:
      size: how many channels.
      where: (path, dimension) of the parameters that have them, alone or merged or concatenated with others.
      order: what stands where now; `None` where they were left as they were.
      reason: why they were, or `""`.

    Examples:
      >>> import nm_jax as nm
      >>> nm.ChannelGroup(4, (("up/kernel", 1), ("down/kernel", 0)), None, "it is an output of the model").size
      4
    """

    size: int
    where: tuple[tuple[str, int], ...]
    order: tuple[int, ...] | None
    reason: str

    def cells(self) -> dict[str, str]:
        """The row as it is printed."""
        names = [f"{path}[{dim}]" for path, dim in self.where]
        listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        done = self.reason or ("moved" if self.order is not None else "no better order found")
        return {"channels": str(self.size), "dimensions": listed, "": done}


@dataclasses.dataclass(frozen=True)
class PermutedLayer:
    """What a permutation did for one sparse parameter.

    Attributes:
      path: of the parameter.
      shape: its shape.
      before: the share of the scores that the best mask kept.
      after: the share that it keeps now; never below `before`.

    Examples:
      >>> import nm_jax as nm
      >>> nm.PermutedLayer("down/kernel", (8, 4), 0.8, 0.83).cells()["kept"]
      '80.00%'
    """

    path: str
    shape: tuple[int, ...]
    before: float
    after: float

    def cells(self) -> dict[str, str]:
        """The row as it is printed."""
        kept, now = f"{100 * self.before:.2f}%", f"{100 * self.after:.2f}%"
        return {"path": self.path, "shape": shape_text(self.shape), "kept": kept, "now": now}


@dataclasses.dataclass(frozen=True)
class PermuteReport:
    """What `nm_jax.permute` did; its string is two tables.

    Attributes:
      layers: one row per sparse parameter.
      channels: one row per set of dimensions that go together.

    Examples:
      >>> import nm_jax as nm
      >>> report = nm.PermuteReport((nm.PermutedLayer("down/kernel", (8, 4), 0.8, 0.83),), ())
      >>> report["down/kernel"].after
      0.83
    """

    layers: tuple[PermutedLayer, ...]
    channels: tuple[ChannelGroup, ...]

    def __getitem__(self, path: str) -> PermutedLayer:
        return row_of(self.layers, path, "among the sparse parameters")

    def __str__(self) -> str:
        rows = [*aligned([row.cells() for row in self.layers]), ""]
        return "\n".join([*rows, *aligned([row.cells() for row in self.channels])])


def permute(
    apply: Callable,
    params: PyTree,
    *inputs: Any,
    pattern: str | Pattern | LeafRules,
    scores: PyTree | None = None,
    seed: int = 0,
    rounds: int = 8,
    on_channels: Callable[[ChannelGroup], None] | None = None,
) -> tuple[PyTree, PermuteReport]:
    """Reorders the channels of a model so that the best masks keep more; the model computes what it computed.

    max over orders of channels, and masks, of the sum over layers of kept scores / scores, the outputs unchanged

    Which dimensions of which parameters must move together is read off the model: through products, convolutions
    (depthwise and grouped ones too), elementwise operations, norms, residual streams, concatenation, reshapes into
    heads (heads as a whole, and within all heads alike), pooling, flattening, tied weights, and scans over layers.
    Inputs and outputs of the model stay in their order, and so does all that cannot be followed; the report says why.

    Args:
      apply: the model's forward pass, `apply(params, *inputs)`; see `nm_jax.plan`. State that has channels (running
        statistics) goes into `params`: an input, or what `apply` closes over, does not move.
      params: parameters, in any container.
      *inputs: the other arguments; arrays, as the model is evaluated on them.
      pattern: the pattern to be; what `nm_jax.plan` makes sparse counts. Or such a plan.
      scores: a tree like `params` of what a mask keeps the most of; `None`: `abs(w)`.
      seed: of the random choices.
      rounds: at most so many, in each of which all channels are moved; fewer when nothing is gained any more.
      on_channels: called with each group of channels when it was moved, once a round: progress.

    Returns:
      The new parameters, arrays that did not move the same ones; and the report.

    Raises:
      ValueError: naming the parameters, if the outputs on `inputs` are not what they were to rounding (1e-5 relative to
        them in float32): nothing is returned then. And for inputs without values, or outputs that are not finite.

    No layer keeps less than before. The search is that of `nm_jax.find_permutation`; not for use inside `jit`.

    Examples:
      >>> import jax, jax.numpy as jnp, nm_jax as nm
      >>> keys = jax.random.split(jax.random.key(0), 4)
      >>> params = {"up": jax.random.normal(keys[0], (4, 16)), "middle": jax.random.normal(keys[1], (16, 16))}
      >>> params["down"] = jax.random.normal(keys[2], (16, 4))
      >>> forward = lambda p, x: jnp.tanh(jnp.tanh(x @ p["up"]) @ p["middle"]) @ p["down"]
      >>> new, report = nm.permute(forward, params, jax.random.normal(keys[3], (2, 4)), pattern="2:4")
      >>> report["middle"].after > report["middle"].before
      True
      >>> report.channels[0].where, report.channels[0].reason
      ((('down', 0), ('middle', 1)), 'no sparse parameter has groups along them')
    """
    rules = pattern if isinstance(pattern, LeafRules) else plan(apply, params, *inputs, pattern=parse_pattern(pattern))
    values = jax.tree.leaves(params)
    resolved = resolve(params, rules, "skip")
    given = leaves_by_path(params if scores is None else scores)
    found = wiring(apply, params, inputs)
    layers = [
        _Layer(leaf, dims, np.asarray(jnp.abs(given[leaf.path]) if scores is None else given[leaf.path]))
        for leaf, dims in zip(resolved, found.dims, strict=True)
        if isinstance(leaf, SparseLeaf)
    ]
    where: dict[Part, dict[tuple[str, int], None]] = {}
    for path, dims in zip(found.paths, found.dims, strict=True):
        for dim, part in enumerate(dims):
            for whole in wholes(part):
                where.setdefault(whole, {})[path, dim] = None
    groups = {whole: tuple(places) for whole, places in where.items() if whole.size > 1}
    reasons = {whole: whole.reason or _hindrance(whole, layers) for whole in groups}
    before = [layer.kept({}) for layer in layers]
    orders: Orders = {}
    kept, rng = list(before), np.random.default_rng(seed)
    for _ in range(rounds):
        last = sum(kept)
        for whole in (whole for whole, reason in reasons.items() if not reason):
            orders, kept = _moved(whole, layers, orders, kept, before, rng)
            if on_channels is not None:
                on_channels(_row(whole, groups, orders, reasons))
        if sum(kept) - last <= _ENOUGH:
            break
    new = _permuted(values, found.dims, orders)
    rebuilt = jax.tree.unflatten(jax.tree.structure(params), new)
    _check(apply, params, rebuilt, inputs, found.dims, groups, orders)
    rows = [
        PermutedLayer(layer.leaf.path, layer.leaf.shape, was, max(was, now))  # but for rounding
        for layer, was, now in zip(layers, before, kept, strict=True)
    ]
    return rebuilt, PermuteReport(tuple(rows), tuple(_row(whole, groups, orders, reasons) for whole in groups))


def _row(whole: Part, groups, orders: Orders, reasons: dict[Part, str]) -> ChannelGroup:
    moved = tuple(map(int, orders[whole])) if whole in orders else None
    return ChannelGroup(int(whole.size), groups[whole], moved, reasons[whole])


@dataclasses.dataclass(frozen=True, eq=False)
class _Layer:
    """A sparse parameter, and what its dimensions are made of."""

    leaf: SparseLeaf
    dims: tuple[Part, ...]
    scores: np.ndarray

    @property
    def tiling(self) -> Tiling:
        return Tiling(self.leaf.shape, self.leaf.axes, *(self.leaf.pattern.tile or (1, 1)))

    def side(self, letter: str) -> Part:
        """The contraction or the output axis, all its dimensions merged."""
        return product([dim for dim, axis in zip(self.dims, self.leaf.axes, strict=True) if axis == letter])

    def matrix(self, orders: Orders) -> Array:
        return jnp.asarray(self.tiling.matrix(_take(self.scores, self.dims, orders)), jnp.float32)

    def kept(self, orders: Orders) -> float:
        """The share of the scores that the best mask keeps."""
        matrix = self.matrix(orders)
        rows = jnp.moveaxis(matrix, 1, 0).reshape(matrix.shape[1], -1)
        total = float(np.sum(np.abs(self.scores), dtype=np.float64)) or 1.0
        return Channels(rows, self.leaf.pattern).kept(np.arange(len(rows))) / total

    def grouped(self, whole: Part, letter: str) -> Int[np.ndarray, "size others"] | bool:
        """Where channels stand along an axis, if whole groups of the pattern run through them; otherwise whether groups
        stay whole when channels move."""
        found = places(self.side(letter), whole)
        if self.leaf.pattern.tile is None or (found is not None and found.size == 0):
            return True
        size = self.leaf.pattern.tile["io".index(letter)]
        if size == 1:
            return True
        if found is None:
            return False
        if whole.size % size == 0 and np.all(np.diff(found, axis=0) == 1) and np.all(found[0] % size == 0):
            return found
        if found.shape[1] % size:
            return False
        runs = np.sort(found, axis=1).reshape(-1, size)
        return bool(np.all(np.diff(runs, axis=1) == 1) and np.all(runs[:, 0] % size == 0))

    def channels(self, whole: Part, orders: Orders) -> list[Channels]:
        """The layer as these channels see it, for each axis along which groups run through them. None if they are on
        both axes of a block: then they change it in two ways at once."""
        sides = [(letter, self.grouped(whole, letter)) for letter in "io"]
        if sum(not isinstance(found, bool) for _, found in sides) > 1:
            return []
        others = {part: own for part, own in orders.items() if part is not whole}
        views = []
        for letter, found in sides:
            if not isinstance(found, bool):
                matrix = self.matrix(others)  # batch, inputs, outputs
                matrix = matrix if letter == "i" else jnp.swapaxes(matrix, 1, 2)
                rows = jnp.moveaxis(matrix[:, found], 1, 0)  # channels, batch, others, the other axis
                views.append(Channels(rows.reshape(len(rows), -1), self.leaf.pattern))
        return views


def _hindrance(whole: Part, layers: list[_Layer]) -> str:
    """Why channels that may be permuted are not, or `""`."""
    gains = False
    for layer in layers:
        for letter in "io":
            found = layer.grouped(whole, letter)
            if found is False:
                return f"groups of {layer.leaf.pattern} of {layer.leaf.path} would be torn"
            gains |= not isinstance(found, bool)
    return "" if gains else "no sparse parameter has groups along them"


def _moved(
    whole: Part, layers: list[_Layer], orders: Orders, kept: list[float], before: list[float], rng
) -> tuple[Orders, list[float]]:
    """The orders with a better one for some channels, and what each layer keeps then: no less than before any moved."""
    views = [view for layer in layers for view in layer.channels(whole, orders)]
    start = orders.get(whole, np.arange(whole.size))
    if not views or np.array_equal(own := improved(views, start, rng), start):
        return orders, kept
    then = {**orders, whole: own}
    met = [whole in {w for dim in layer.dims for w in wholes(dim)} for layer in layers]
    now = [layer.kept(then) if has else was for layer, has, was in zip(layers, met, kept, strict=True)]
    worse = any(new < was - _ROUNDING for new, was in zip(now, before, strict=True))
    return (orders, kept) if worse or sum(now) <= sum(kept) else (then, now)


def _take(leaf: Any, dims: tuple[Part, ...], orders: Orders) -> Any:
    for dim, part in enumerate(dims):
        if any(whole in orders for whole in wholes(part)):
            leaf = (np if isinstance(leaf, np.ndarray) else jnp).take(leaf, order(part, orders), axis=dim)
    return leaf


def _permuted(leaves: list[Any], dims: tuple[tuple[Part, ...], ...], orders: Orders) -> list[Any]:
    return [_take(leaf, own, orders) for leaf, own in zip(leaves, dims, strict=True)]


def _check(apply: Callable, params: PyTree, new: PyTree, inputs: tuple, dims, groups, orders: Orders) -> None:
    """Raises a ValueError if a model with permuted parameters does not compute what it did."""
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves((params, inputs))):
        raise ValueError("parameters and inputs must have values: the permuted model is evaluated on them")
    skeleton, arrays = Skeleton.of(params)
    run = evaluation(apply, skeleton)
    with jax.default_matmul_precision("highest"):
        was = jax.tree.leaves(run(arrays, *inputs))
        if any(not np.all(np.isfinite(np.asarray(jnp.asarray(out, float)))) for out in was):
            raise ValueError(
                "the outputs of the model are not finite, so that they cannot be compared; give other inputs"
            )
        if _agree(was, jax.tree.leaves(run(Skeleton.of(new)[1], *inputs))):
            return
        leaves = jax.tree.leaves(params)
        for whole, own in orders.items():
            alone = jax.tree.unflatten(jax.tree.structure(params), _permuted(leaves, dims, {whole: own}))
            if not _agree(was, jax.tree.leaves(run(Skeleton.of(alone)[1], *inputs))):
                names = ", ".join(f"{path} (dimension {dim})" for path, dim in groups[whole])
                raise ValueError(
                    f"the outputs change when the {whole.size} channels of {names} are permuted, which should not be; "
                    "leave these parameters dense in the plan, and report the model"
                )
    raise ValueError("the outputs change beyond rounding when all channels are permuted; leave some layers dense")


def _agree(before: list[Any], after: list[Any]) -> bool:
    for was, now in zip(before, after, strict=True):
        if not jnp.issubdtype(was.dtype, jnp.floating):
            if not np.array_equal(was, now):
                return False
            continue
        limit = max(_AGREE, 4 * float(jnp.finfo(was.dtype).eps))
        old, new = np.asarray(was, np.float64), np.asarray(now, np.float64)
        if not np.linalg.norm(new - old) <= limit * np.linalg.norm(old):
            return False
    return True
