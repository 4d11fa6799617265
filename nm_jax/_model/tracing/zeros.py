"""Elementwise operations, and where their results are zero.

A mask on a parameter makes a weight sparse only if the weight is zero wherever the parameter is. Products with
anything, casts, clips around zero and straight-through estimators leave it so; sums with something else do not.
"""

import math
from collections.abc import Sequence

from nm_jax._model.tracing._jaxpr import Equation
from nm_jax._model.tracing.uses import Value
from nm_jax._model.tracing.views import View

SUMS = frozenset(("add", "add_any", "sub", "or", "xor"))
_PRODUCTS = frozenset(("mul", "and"))
_OF_THE_FIRST = frozenset().union(  # zero where the first operand is
    ("neg", "sign", "abs", "floor", "ceil", "round", "square", "sqrt", "cbrt", "log1p", "expm1", "real", "imag"),
    ("sin", "tan", "asin", "atan", "sinh", "tanh", "asinh", "atanh", "erf", "erf_inv"),
    ("div", "rem", "copysign", "atan2", "shift_left", "shift_right_arithmetic", "shift_right_logical"),
)
# Operations whose result has, in every place, what was made of the entries in that place.
ELEMENTWISE = SUMS.union(
    *(_PRODUCTS, _OF_THE_FIRST),
    ("max", "min", "pow", "integer_pow", "clamp", "select_n", "dynamic_update_slice", "scatter"),
    ("rsqrt", "exp", "exp2", "log", "cos", "acos", "cosh", "acosh", "logistic", "lgamma", "digamma", "nextafter"),
    ("is_finite", "not", "eq", "ne", "lt", "le", "gt", "ge"),
)


def stays_zero(eqn: Equation, operands: Sequence[Value], view: View) -> bool:
    """Whether an elementwise operation is zero wherever the parameter of a view of an operand is."""
    name = eqn.primitive.name

    def zero(value: Value) -> bool:
        if value.scalar is not None:
            return value.scalar == 0 or math.isnan(value.scalar)  # what is out of bounds is filled with NaN
        return any(not v.changed and _same_place(v, view) for v in value.views)

    def beyond(value: Value, sign: int) -> bool:
        return zero(value) or (value.scalar is not None and sign * value.scalar >= 0)

    if name in SUMS:
        return all(map(zero, operands))
    if name in _PRODUCTS:
        return any(map(zero, operands))
    if name in _OF_THE_FIRST:
        return zero(operands[0])
    if name in ("max", "min"):
        return all(beyond(value, -1 if name == "max" else 1) for value in operands)
    if name == "clamp":
        return beyond(operands[0], -1) and zero(operands[1]) and beyond(operands[2], 1)
    if name == "select_n":
        return all(map(zero, operands[1:]))
    if name == "integer_pow":
        return eqn.params["y"] > 0 and zero(operands[0])
    if name == "pow":
        return zero(operands[0]) and operands[1].scalar is not None and operands[1].scalar > 0
    if name in ("dynamic_update_slice", "scatter"):
        return zero(operands[0]) and zero(operands[1 if name == "dynamic_update_slice" else 2])
    return False


def _same_place(one: View, other: View) -> bool:
    return (one.leaf, one.dims, one.fixed) == (other.leaf, other.dims, other.fixed)
