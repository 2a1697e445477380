"""Sums of two products, rounded alike in every program.

A compiler may compute a b + c d with one rounding less, as fma(a, b, c d) or as fma(c, d, a b), and chooses anew in
each program: on another mesh the last bit of an average may differ. In a moment of few bits that can become another
code, and then the runs differ. So where a leaf's moments are stored in few bits, the first of two products is rounded
before the sum. One product is left, and compilers agree on it.

Leaves with float32 moments, or with a `mu_dtype`, are stepped by Optax's operations, so that they have Optax's bits.
"""

from collections.abc import Callable
from typing import Any

import jax

from adamite.numerics import unfused

PRODUCTS = frozenset({"mul", "div", "integer_pow", "square"})
"""Operations that are multiplications, or that XLA turns into some: a quotient by one number, a power."""
SUMS = frozenset({"add", "sub"})


def round_products(step: Callable[..., Any]) -> Callable[..., Any]:
    """`step`, a function from trees of arrays to one, in which no sum is of two products that are not yet rounded."""

    def rounded(*args: Any) -> Any:
        closed, shapes = jax.make_jaxpr(step, return_shape=True)(*args)
        results = _run(closed.jaxpr, closed.consts, jax.tree.leaves(args))
        return jax.tree.structure(shapes).unflatten(results)

    return rounded


def _run(jaxpr: Any, consts: Any, arguments: Any) -> list[Any]:
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *arguments), strict=True))
    products = {out for eqn in jaxpr.eqns if eqn.primitive.name in PRODUCTS for out in eqn.outvars}

    def is_literal(x: Any) -> bool:
        return hasattr(x, "val")

    def value(x: Any) -> Any:
        return x.val if is_literal(x) else values[x]

    for eqn in jaxpr.eqns:
        operands = [value(x) for x in eqn.invars]
        if eqn.primitive.name in SUMS and all(not is_literal(x) and x in products for x in eqn.invars):
            operands[0] = unfused(operands[0])
        out = eqn.primitive.bind(*operands, **eqn.primitive.get_bind_params(eqn.params))
        values |= zip(eqn.outvars, out if eqn.primitive.multiple_results else [out], strict=True)
    return [value(x) for x in jaxpr.outvars]
