"""Steps by a kernel, interpreted, beside those that XLA fuses."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import adamite
from adamite.core.tree_pass import Leafwise, TreePass
from adamite.engines import Leaf

QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""For programs that run once."""
ROUNDINGS = ("nearest", "stochastic", "residual8", "residual16")


def tree(shapes: Any, seed: int = 0, dtype: Any = jnp.float32) -> list[jax.Array]:
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def by(kernel: Any, tx: Leafwise) -> Any:
    """The step of `tx` by a kernel's module; by XLA for None."""
    run = TreePass(tx.part)

    def step(params: Any, state: Any, grads: Any) -> Any:
        if kernel is None:
            return run.step(grads, state, params, "xla")
        scalars, columns = tx.part.begin(grads, state, params)
        rows = zip(grads, params, columns, strict=True)
        leaves = [Leaf(i, g, p, stored, run.rounded_to(run.to_weights, g, p)) for i, (g, p, stored) in enumerate(rows)]
        assert not any(kernel.why_not(run.to_weights, leaf) for leaf in leaves)
        done = kernel.run(run.to_weights, scalars, leaves, interpret=True)
        return [p for p, _ in done], tx.part.end(state, [stored for _, stored in done], jax.tree.structure(grads))

    return jax.jit(step, compiler_options=QUICKLY)


def compare(kernel: Any, tx: Leafwise, shapes: Any, dtype: Any = jnp.float32, steps: int = 2) -> None:
    """Some steps by a kernel, each beside that which XLA makes of the same numbers."""
    params = tree(shapes, 0, dtype)
    start = params, tx.init(params)
    step, plain = by(kernel, tx), by(None, tx)
    for i in range(steps):
        g = tree(shapes, i + 1, dtype)
        assert_close(step(*start, g), start := plain(*start, g))


def assert_close(ours: Any, theirs: Any, ulps: float = 2.0) -> None:
    """Weights and state after one step by two programs: to some ulps of the largest number, codes but for ties."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    stored = [x.dtype for x in jax.tree.leaves((ours[0], _kept(ours[1])))]
    ours, theirs = ((adamite.full_weights(params, state), _kept(state)) for params, state in (ours, theirs))
    leaves = jax.tree_util.tree_leaves_with_path(ours)
    for (path, a), b, dtype in zip(leaves, jax.tree.leaves(theirs), stored, strict=True):
        where = jax.tree_util.keystr(path)
        assert (a.shape, a.dtype) == (b.shape, b.dtype), where
        a, b = np.asarray(a), np.asarray(b)
        if a.dtype.kind in "iu":
            assert np.sum(a != b) <= 1 + a.size / 1000, where
        else:
            a, b, ulp = a.astype(np.float32), b.astype(np.float32), ulps * 2.0**-23
            atol = ulp * np.max(np.abs(b), initial=0)
            close = np.isclose(a, b, rtol=ulp, atol=atol)
            ties = a.size / 10_000 + (dtype == jnp.bfloat16)  # weights with a residual are bfloat16, too
            assert np.sum(~close) <= ties, where
            np.testing.assert_allclose(a, b, rtol=2.0**-7, atol=atol, err_msg=where)  # a unit of bfloat16


def _kept(state: Any) -> list[Any]:
    """The state without residuals of 16 bits, which are only the last bits of the full weights."""
    return [x for x in jax.tree.leaves(state) if x.dtype != jnp.int16]


def adamw(moments: Any = "float32", rounding: Any = None) -> Any:
    return adamite.adamw(1e-2, weight_decay=0.1, moments=moments, rounding=rounding)
