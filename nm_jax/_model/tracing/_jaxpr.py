"""What this library knows of jaxprs beyond the public names of `jax.extend`: where jax renames things, only this file
changes. `tests/model/test_jaxprs.py` runs it on the oldest and the newest jax."""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

from jax.extend import core

Jaxpr: TypeAlias = core.Jaxpr
Equation: TypeAlias = core.JaxprEqn
Literal: TypeAlias = core.Literal

# Operations that evaluate another jaxpr once on their own operands -> the parameter that holds it.
_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vmap_call": "call",
}


def shape_of(var: Any) -> tuple[int, ...]:
    """The shape of a variable or a literal."""
    return tuple(var.aval.shape)


class Opened(NamedTuple):
    """A jaxpr and the values of its constants."""

    jaxpr: Jaxpr
    consts: Sequence[Any]


def opened(jaxpr: Any) -> Opened:
    """A jaxpr with its constants apart: up to jax 0.11 a `ClosedJaxpr` holds both, since 0.12 the `Jaxpr` itself."""
    return Opened(getattr(jaxpr, "jaxpr", jaxpr), tuple(getattr(jaxpr, "consts", ())))


def called(eqn: Equation) -> Opened | None:
    """The jaxpr that an equation does nothing but evaluate, if it is such an equation."""
    key = _CALLS.get(eqn.primitive.name)
    inner = opened(eqn.params[key]) if key in eqn.params else None
    return inner if inner is not None and len(inner.jaxpr.invars) == len(eqn.invars) else None


class Loop(NamedTuple):
    """A scan or a while: its operands are constants, then the carry, then (scan only) what it goes through."""

    body: Opened
    consts: int
    carry: int
    length: int | None
    reverse: bool = False
    skipped: int = 0  # operands before the constants, which the body does not see


def loop(eqn: Equation) -> Loop:
    """What a scan or a while is. `length` is `None` where it is not known."""
    params = eqn.params
    if eqn.primitive.name == "while":
        body, skipped, consts = opened(params["body_jaxpr"]), params["cond_nconsts"], params["body_nconsts"]
        return Loop(body, consts, len(body.jaxpr.invars) - consts, None, skipped=skipped)
    if "num_consts" in params:
        consts, carry = params["num_consts"], params["num_carry"]
    else:  # jax 0.12: a tree of (constants, carry, what it goes through)
        consts, carry, _ = (len(list(part.vals)) for part in params["ft_in"].unpack())
    return Loop(opened(params["jaxpr"]), consts, carry, params["length"], params["reverse"])


def branches(eqn: Equation) -> list[Opened]:
    """The jaxprs that a `cond` chooses from by its first operand; the others are theirs."""
    return [opened(branch) for branch in eqn.params["branches"]]


def bind(eqn: Equation, operands: Sequence[Any]) -> list[Any]:
    """The results of an equation on values or tracers."""
    results = eqn.primitive.bind(*operands, **eqn.primitive.get_bind_params(eqn.params))
    return list(results) if eqn.primitive.multiple_results else [results]
