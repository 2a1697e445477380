"""The last part of a chain: updates that land weights of 16 bits where a rounding puts them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import keystr

from adamite import checks
from adamite.core.matching import counterparts, difference, same_rank, shape_of
from adamite.core.optimizer import Optimizer
from adamite.core.ownership import belonging, is_absent
from adamite.core.part import Part
from adamite.core.placement import beside
from adamite.core.tree_pass import leafwise
from adamite.engines import moved
from adamite.identity import described, identity
from adamite.numerics import as_array, cast, constants, is_none, unfused, widen
from adamite.paths import leaves_with_path, map_with_path, unwrapped
from adamite.random_bits import fold
from adamite.rounding import (
    NAMES,
    RESIDUALS,
    SHORT,
    Nearest,
    Residual8,
    Residual16,
    Rounding,
    Stochastic,
    as_stored,
)


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
        if not residual_dtype or not isinstance(state, RoundingState):
            return key, [None] * len(jax.tree.leaves(updates, is_leaf=is_none))
        residuals = counterparts(updates, state.residual, "residual", same_rank)
        weights = counterparts(updates, params, "params")
        for (path, u), p, residual in zip(leaves_with_path(updates, is_none), weights, residuals, strict=True):
            if u is not None:
                _checked(path, p, residual)
        return key, residuals

    def step(key: Any, u: jax.Array, p: jax.Array, residual: Any, bits: Any) -> tuple[jax.Array, Any]:
        if not _short(p):
            return u, residual
        wide = p.astype(jnp.float32)
        target, new = target_of(key, u, p, residual, bits)
        step = target - wide
        if residual is None:
            return step, None
        # p + u is the target, but for a step to less than p / 2^15. Of such a theta nothing is left for a residual: the
        # comparison changes no result that matters. But without it XLA keeps one more array of each slice.
        return step, jnp.where(wide + step == target, new, 0)

    def target_of(key: Any, u: jax.Array, p: jax.Array, residual: Any, bits: Any) -> tuple[jax.Array, Any]:
        with constants():
            return how.round(how.weights(p, residual) + unfused(cast(u, jnp.float32)), p.dtype, lambda: bits(key))

    def to_weights(key: Any, u: jax.Array, p: jax.Array, residual: Any, bits: Any) -> tuple[jax.Array, Any]:
        if not _short(p):
            return moved(p, u), residual
        target, new = target_of(key, u, p, residual, bits)
        return target.astype(p.dtype), new

    def end(state: Any, columns: list[Any], structure: Any) -> Any:
        if not isinstance(state, RoundingState):
            return state
        residual = structure.unflatten(columns) if residual_dtype else ()
        return RoundingState(optax.safe_increment(state.count), residual)

    def weights(p: jax.Array, residual: Any) -> jax.Array:
        with constants():
            return how.weights(p, residual) if _short(p) else widen(p)

    return leafwise(Part(init, begin, step, end, weights, to_weights, in_slices=residual_dtype is not None))


def rounds_weights(tx: Any) -> bool:
    """Whether `round_weights` is in a transformation of ours, also inside of others of ours."""

    def rounds(told: Any) -> bool:
        if isinstance(told, tuple):
            return any(map(rounds, told))
        if not isinstance(told, dict):
            return False
        own = told.get("name") == round_weights.__name__ or told.get("rounding") is not None
        return own or any(rounds(value) for name, value in told.items() if name != "param_shardings")

    return rounds(identity(tx))


def full_weights(params: optax.Params, state: optax.OptState) -> optax.Params:
    """The weights that the optimizer steps: those of the model together with their residuals, in at least float32.

    Args:
        params: the model's weights. Leaves that are no floating or complex arrays are returned as they are.
        state: the optimizer's state. Residuals are found anywhere inside, each for its own leaves: in chains, guards,
            `optax.partition` and `optax.masked`, and in the variables of `nnx.Optimizer`. Weights without residuals are
            only cast.

    Returns:
        Tree of the structure and shapes of `params`.

    Raises:
        ValueError: residuals are of other parameters, or several of one.

    Example:
        >>> tx, params = round_weights("residual8"), jnp.ones(1, jnp.bfloat16)
        >>> updates, state = tx.update(jnp.full(1, 1e-3), tx.init(params), params)
        >>> params = optax.apply_updates(params, updates)
        >>> print(params, f"{full_weights(params, state)[0]:.4f}")
        [1] 1.0010
    """
    leaves = leaves_with_path(params)
    places = jax.tree.structure(unwrapped(params)).unflatten(range(len(leaves)))
    residuals: list[Any] = [None] * len(leaves)
    for node in jax.tree.leaves(unwrapped(state), is_leaf=lambda x: isinstance(x, RoundingState)):
        if not isinstance(node, RoundingState) or not jax.tree.leaves(node.residual):
            continue
        found = belonging(node.residual, places)
        if found is None:
            whole = jax.tree.map(lambda _: 0, node.residual, is_leaf=is_absent)
            first = difference(unwrapped(params), "params", whole, "the residual")
            raise ValueError(f"params and the residual in state differ in structure: {first}")
        for number, residual in found:
            if residuals[number] is not None:
                raise ValueError(f"state must have one residual of params{keystr(leaves[number][0])}, got two")
            residuals[number] = _checked(*leaves[number], residual)
    full = [_full(p, residual) for (_, p), residual in zip(leaves, residuals, strict=True)]
    return jax.tree.structure(params).unflatten(full)


def _full(p: Any, residual: Any) -> Any:
    """A weight and its residual; what is no weight is itself."""
    if not jnp.issubdtype(getattr(p, "dtype", type(p)), jnp.inexact):
        return p
    return RESIDUALS[residual.dtype].weights(p, residual) if residual is not None and _short(p) else widen(as_stored(p))


def _checked(path: Any, p: Any, residual: Any) -> Any:
    """A weight's residual; refused if it is another's."""
    shape = shape_of(p)
    if residual.shape == (shape if _short(as_array(p)) else (1,) * len(shape)):
        return residual
    if residual.shape == shape:
        raise ValueError(
            f"params{keystr(path)} is {p.dtype.name}, but the residual in state is of a weight of 16 bits: apply "
            "updates by tx.step or optax.apply_updates, which keep the weights' dtypes (eqx.apply_updates does not)"
        )
    raise ValueError(f"params{keystr(path)} has shape {shape}, but its residual in state has shape {residual.shape}")


def _short(p: Any) -> bool:
    return p.dtype in SHORT


def _rounding(rounding: Any) -> Rounding:
    if isinstance(rounding, (Nearest, Stochastic, Residual8, Residual16)):
        return rounding
    return NAMES[checks.one_of("rounding", rounding, tuple(NAMES))]
