"""A model cut into blocks: stretches of its program, each a function of parameters, inputs, and what the last one left.

A program can be cut anywhere; what is passed on is every value that both parameters and inputs made and that something
behind the cut reads. Where that is a single one (behind the sum of a residual block, between plain layers, behind a
concatenation) a block of the model ends. What depends on parameters alone (a weight in another precision) or on inputs
alone (an attention mask) is not passed on: a block makes it anew.
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from nm_jax._model.tracing import LeafTrace, walk_model
from nm_jax._model.tracing._jaxpr import Equation, Literal, Opened, bind, called

# Calls with derivatives of their own stay whole.
_CUSTOM = ("custom_jvp_call", "custom_vjp_call", "custom_vmap_call")


class Line(NamedTuple):
    """An equation between numbered values."""

    eqn: Equation
    operands: tuple[int | Literal, ...]
    results: tuple[int, ...]


class Block(NamedTuple):
    """A stretch of a program.

    Attributes:
      given: what it is passed.
      wanted: what it passes on, or the outputs of the model.
      made: which of `wanted` are its own, and not only passed through.
      lines: the equations that it needs.
      leaves: the parameters that meet data in it, by their number among all leaves.
    """

    given: tuple[int, ...]
    wanted: tuple[int, ...]
    made: tuple[bool, ...]
    lines: tuple[Line, ...]
    leaves: frozenset[int]


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A model as a list of equations, calls opened.

    Attributes:
      lines: the equations.
      consts: values of the constants.
      arrays: which leaves of the parameters are arrays; these are its first values.
      inputs: how many values come next, of the inputs.
      outputs: its results that parameters and inputs made.
      traces: how each leaf is used.
      leaves: for each line the leaves that meet data there.
      made: for each line whether parameters and inputs made its results.
    """

    lines: list[Line]
    consts: dict[int, Any]
    arrays: list[int]
    inputs: int
    outputs: tuple[int, ...]
    traces: list[LeafTrace]
    leaves: list[frozenset[int]]
    made: list[bool]

    @classmethod
    def of(cls, apply: Callable, params: PyTree, inputs: tuple) -> "Program":
        """Of a forward pass."""
        traced = walk_model(apply, params, inputs)
        numbers = itertools.count()
        arguments = [next(numbers) for _ in traced.program.jaxpr.invars]
        lines: list[Line] = []
        consts: dict[int, Any] = {}
        results = _open(traced.program, arguments, lines, consts, numbers)
        count = len(traced.arrays)
        alone = {k: frozenset([leaf]) for k, leaf in enumerate(traced.arrays)}  # made by parameters alone -> of which
        data, both = set(arguments[count:]), set()
        leaves, made = [], []
        for line in lines:
            slots = [k for k in line.operands if isinstance(k, int)]
            met = frozenset().union(*(alone[k] for k in slots if k in alone))
            reads = any(k in data for k in slots)
            mixed = reads and (bool(met) or any(k in both for k in slots))
            for k in line.results:
                if reads:
                    data.add(k)
                elif met:
                    alone[k] = met
                if mixed:
                    both.add(k)
            leaves.append(met if reads else frozenset())
            made.append(mixed)
        outputs = dict.fromkeys(k for k in results if isinstance(k, int) and k in both)
        traces = [
            LeafTrace(p, s, tuple(u)) for p, s, u in zip(traced.paths, traced.shapes, traced.walk.uses, strict=True)
        ]
        inputs_count = len(arguments) - count
        return cls(lines, consts, traced.arrays, inputs_count, tuple(outputs), traces, leaves, made)

    def blocks(self, masked: Collection[int], fitted: Collection[int], layers: int) -> list[Block]:
        """The blocks of a model, each with so many parameters of `masked` at least; a parameter of `fitted` that
        several would share joins them. What follows the last is left out."""
        contracted = {k for k, leaf in enumerate(self.traces) if leaf.contractions} | set(masked)
        cuts, held, start = [0], set[int](), 0
        end = max((p for p, met in enumerate(self.leaves) if met & set(masked)), default=0)
        for cut in [p for p in range(1, len(self.lines)) if len(self._live[p]) == 1] + [len(self.lines)]:
            met = frozenset().union(*self.leaves[start:cut])
            first = start > 0 and len(cuts) == 1 and not held and met & set(masked)
            if first or (met & contracted and (len(held) >= layers or (held and start > end))):
                cuts.append(start)
                held = set()
            held |= met & set(masked)
            start = cut
        cuts = [*cuts, len(self.lines)]
        if len(cuts) > 2 and not held:
            cuts.pop()
        return self._between(cuts, fitted)

    def blocks_from(self, boundaries: Sequence[str], fitted: Collection[int]) -> list[Block]:
        """Blocks of which each but the first begins before the first use of a parameter whose path a regular expression
        finds.

        Raises:
          ValueError: for an expression that finds none, or whose parameters are those of another one.
        """
        cuts, last = [0], 0
        for number, regex in enumerate(boundaries):
            found = {k for k, leaf in enumerate(self.traces) if re.search(regex, leaf.path)}
            uses = [p for p, met in enumerate(self.leaves) if met & found]
            if not uses:
                raise ValueError(f"boundaries: no parameter that meets data has a path that {regex!r} finds")
            if number and uses[0] <= last:
                raise ValueError(
                    f"boundaries: {regex!r} finds {self.traces[min(found)].path}, which is used no later than what "
                    f"{boundaries[number - 1]!r} finds; list them in the order of the model"
                )
            # Behind what the parameter before it does, where the least is passed on, and as late as that.
            before = [p for p in range(uses[0]) if self.leaves[p]]
            places = range(before[-1] + 1 if before else 0, uses[0] + 1)
            cut = min(places, key=lambda p: (len(self._live[p]), -p)) if before else 0
            cuts, last = [*cuts, cut], uses[0]
        return self._between([*dict.fromkeys(cuts), len(self.lines)], fitted)

    def _between(self, cuts: list[int], fitted: Collection[int]) -> list[Block]:
        ends: dict[int, int] = {}
        for k in fitted:
            uses = [p for p, met in enumerate(self.leaves) if k in met]
            if uses:
                ends[min(uses)] = max(ends.get(min(uses), 0), max(uses))
        inner = [p for p in cuts[1:-1] if not any(first < p <= last for first, last in ends.items())]
        if any(first < cuts[-1] <= last for first, last in ends.items()):
            cuts = [*cuts[:-1], len(self.lines)]
        cuts = [cuts[0], *inner, cuts[-1]]
        return [self._block(a, b) for a, b in itertools.pairwise(cuts)]

    def _block(self, start: int, end: int) -> Block:
        given, wanted = self._live[start], self._live[end]
        needed, lines = set(wanted) - set(given), []
        for line in reversed(self.lines[:end]):
            if needed.intersection(line.results):
                lines.append(line)
                needed |= {k for k in line.operands if isinstance(k, int)} - set(given)
        leaves = frozenset().union(*self.leaves[start:end])
        return Block(given, wanted, tuple(k not in given for k in wanted), tuple(reversed(lines)), leaves)

    @functools.cached_property
    def _live(self) -> list[tuple[int, ...]]:
        """What is passed on at every cut."""
        last = dict.fromkeys(self.outputs, len(self.lines))
        for p, line in reversed(list(enumerate(self.lines))):
            for k in line.operands:
                if isinstance(k, int):
                    last.setdefault(k, p)
        live: list[list[int]] = [[] for _ in range(len(self.lines) + 1)]
        for p, line in enumerate(self.lines):
            for k in line.results if self.made[p] else ():
                for cut in range(p + 1, last.get(k, -1) + 1):
                    live[cut].append(k)
        return [tuple(found) for found in live]

    def run(self, block: Block, params: Mapping[int, Any], inputs: tuple, given: tuple) -> tuple:
        """What a block passes on."""
        values = dict(self.consts)
        values.update(enumerate([*(params[k] for k in self.arrays), *jax.tree.leaves(inputs)]))
        values.update(zip(block.given, given, strict=True))
        for line in block.lines:
            operands = [values[k] if isinstance(k, int) else k.val for k in line.operands]
            values.update(zip(line.results, bind(line.eqn, operands), strict=True))
        return tuple(jnp.asarray(values[k]) for k in block.wanted)


def _open(program: Opened, operands: Sequence[int | Literal], lines: list[Line], consts: dict[int, Any], numbers):
    """Adds the equations of a program to `lines`; its results."""
    jaxpr = program.jaxpr
    known: dict[Any, int | Literal] = dict(zip(jaxpr.invars, operands, strict=True))
    fixed = {var: next(numbers) for var in jaxpr.constvars}
    known.update(fixed)
    consts.update(zip(fixed.values(), program.consts, strict=True))

    def read(var):
        return var if isinstance(var, Literal) else known[var]

    for eqn in jaxpr.eqns:
        inner = None if eqn.primitive.name in _CUSTOM else called(eqn)
        given = tuple(read(var) for var in eqn.invars)
        if inner is not None:
            results = _open(inner, given, lines, consts, numbers)
        else:
            results = [next(numbers) for _ in eqn.outvars]
            lines.append(Line(eqn, given, tuple(results)))
        known.update(zip(eqn.outvars, results, strict=True))
    return [read(var) for var in jaxpr.outvars]
