"""The last part of a chain: updates that land weights of 16 bits where a rounding puts them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import keystr

from adamite import checks
from adamite.engine.leafwise import leafwise
from adamite.engine.matching import counterparts, same_rank
from adamite.engine.optimizer import Optimizer
from adamite.engine.parts import Part
from adamite.engine.placement import beside
from adamite.identity import described
from adamite.numerics import as_array, cast, is_none, unfused, widen
from adamite.paths import map_with_path
from adamite.random_bits import fold
from adamite.rounding import NAMES, Nearest, Residual8, Residual16, Rounding, Stochastic, nearest


class RoundingState(NamedTuple):
    """State of `round_weights`: what of the weights their dtype does not hold."""

    count: Any  # int32, shape (): steps so far
    residual: Any  # int8 or int16, tree of the parameters' shapes; (1, ..., 1) for weights of 32 bits; () without any


@described
def round_weights(rounding: Any = "stochastic") -> Optimizer:
    """Make updates with which ``optax.apply_updates`` lands weights of 16 bits exactly where a rounding puts them.

    It comes last in a chain, and what comes before it computes in float32. The updates of such weights are float32,
    whatever the gradients are: in 16 bits they would miss. Weights of other dtypes take their updates as they are.

    Args:
        rounding: "nearest", "stochastic", "residual8" or "residual16", or an object of `adamite.rounding`.

    Returns:
        The transformation; its update needs `params`. Its state is a `RoundingState`; without a residual that is the
        count alone, and ``optax.EmptyState`` for "nearest".

    Raises:
        ValueError: `rounding` is unknown; at init, "residual16" is given float16 weights; at update, there are no
            `params`.
        TypeError: `rounding` is the wrong kind of thing.

    Example:
        Ten updates of 0.001, a fraction of the spacing at 1, which is 1/128:

        >>> for rounding in ("nearest", "residual8"):
        ...     tx, params = round_weights(rounding), jnp.ones(3, jnp.bfloat16)
        ...     state = tx.init(params)
        ...     for _ in range(10):
        ...         updates, state = tx.update(jnp.full(3, 1e-3), state, params)
        ...         params = optax.apply_updates(params, updates)
        ...     print(params)
        [1 1 1]
        [1.00781 1.00781 1.00781]
    """
    how = _rounding(rounding)
    seed, residual_dtype = how.seed, how.residual_dtype
    kind = RoundingState if residual_dtype or seed is not None else optax.EmptyState

    def init(params: optax.Params) -> Any:
        checks.differentiable(params, "params")
        if kind is optax.EmptyState:
            return optax.EmptyState()
        residual = map_with_path(_fresh, params) if residual_dtype else ()
        return RoundingState(jnp.zeros((), jnp.int32), residual)

    def _fresh(path: Any, param: Any) -> jax.Array:
        leaf = param if isinstance(param, jax.ShapeDtypeStruct) else as_array(param)
        if leaf.dtype == jnp.float16 and isinstance(how, Residual16):
            raise ValueError(f"params{keystr(path)} is float16; residual16 is for bfloat16, residual8 for both")
        if not _short(leaf):
            return beside(leaf, jnp.zeros((1,) * len(leaf.shape), residual_dtype))
        return beside(leaf, jnp.zeros_like(leaf, residual_dtype))

    def begin(updates: optax.Updates, state: Any, params: optax.Params | None) -> tuple[Any, list[Any]]:
        if params is None:
            raise ValueError("weights cannot be rounded without params: call update(updates, state, params)")
        if not isinstance(state, kind):
            raise TypeError(f"state must be a {kind.__name__}, got {type(state).__name__}")
        number: Any = optax.safe_increment(state.count) if isinstance(state, RoundingState) else 0
        key = None if seed is None else fold(seed, number)
        if residual_dtype and isinstance(state, RoundingState):
            return key, counterparts(updates, state.residual, "residual", same_rank)
        return key, [None] * len(jax.tree.leaves(updates, is_leaf=is_none))

    def step(key: Any, u: jax.Array, p: jax.Array, residual: Any, bits: Any) -> tuple[jax.Array, Any]:
        if not _short(p):
            return u, residual
        wide = p.astype(jnp.float32)
        target, new = how.round(how.weights(p, residual) + unfused(cast(u, jnp.float32)), p.dtype, lambda: bits(key))
        step = target - wide
        if residual is None:
            return step, None
        # p + u is the target, but for a step across 0 from just below a power of two, to less than p / 2^15. There it
        # is within half a unit in the last place of p, and theta has so few bits that nothing is left for a residual:
        # the comparison changes no result. But without it XLA keeps one more array of each slice.
        return step, jnp.where(nearest(wide + step, p.dtype) == target, new, 0)

    def end(state: Any, columns: list[Any], structure: Any) -> Any:
        if not isinstance(state, RoundingState):
            return state
        residual = structure.unflatten(columns) if residual_dtype else ()
        return RoundingState(optax.safe_increment(state.count), residual)

    def weights(p: jax.Array, residual: Any) -> jax.Array:
        return how.weights(p, residual) if _short(p) else widen(p)

    return leafwise(Part(init, begin, step, end, weights, in_slices=residual_dtype is not None))


def full_weights(params: optax.Params, state: optax.OptState) -> optax.Params:
    """The weights that the optimizer steps: those of the model together with their residuals, in at least float32.

    Args:
        params: the model's weights.
        state: the optimizer's state. If there is a `RoundingState` with residuals in it, they are those of `params`;
            if there is none, the weights are only cast.

    Returns:
        Tree of the structure and shapes of `params`.

    Raises:
        ValueError: there are several states with residuals, or they are of other parameters.
        TypeError: a leaf of `params` has no shape and dtype.

    Example:
        >>> tx, params = round_weights("residual8"), jnp.ones(1, jnp.bfloat16)
        >>> updates, state = tx.update(jnp.full(1, 1e-3), tx.init(params), params)
        >>> params = optax.apply_updates(params, updates)
        >>> print(params, f"{full_weights(params, state)[0]:.4f}")
        [1] 1.0010
    """
    checks.abstract(params, "params")
    nodes = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, RoundingState))
    found = [x.residual for x in nodes if isinstance(x, RoundingState) and jax.tree.leaves(x.residual)]
    if not found:
        return jax.tree.map(widen, params)
    if len(found) > 1:
        raise ValueError(f"state must have residuals in one place, got {len(found)} of them")
    leaves, structure = jax.tree.flatten(params)
    residuals = counterparts(params, found[0], "residual", same_rank)
    kinds = {kind.residual_dtype: kind for kind in (Residual8(), Residual16())}
    return structure.unflatten(
        kinds[r.dtype].weights(p, r) if _short(p) else widen(p) for p, r in zip(leaves, residuals, strict=True)
    )


def _short(p: Any) -> bool:
    return p.dtype in (jnp.bfloat16, jnp.float16)


def _rounding(rounding: Any) -> Rounding:
    if isinstance(rounding, (Nearest, Stochastic, Residual8, Residual16)):
        return rounding
    return NAMES[checks.one_of("rounding", rounding, tuple(NAMES))]
