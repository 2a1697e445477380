"""Weights from one rounding to another, between two steps.

    theta        <- weights(p, residual)      what the optimizer steps, float32
    p, residual  <- round(theta)              the residual to the nearest

A float32 run goes on with bfloat16 weights, whose residuals hold what their dtype drops; and back.
"""

import functools
import itertools
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import keystr

from adamite import checks
from adamite.core import RoundingState
from adamite.core.matching import difference
from adamite.core.placement import beside, settle
from adamite.numerics import cast, widen
from adamite.paths import leaves_with_path, map_with_path
from adamite.rounding import RESIDUALS, SHORT, nearest

KEY = re.compile(r"""\.[^.\[]+ | \[ (?: '(?:[^'\\]|\\.)*' | "(?:[^"\\]|\\.)*" | [^\[\]'"]* ) \]""", re.VERBOSE)
"""One key of a path of `jax.tree_util.keystr`."""


def convert_weights(
    params: optax.Params, state: Any, tx: optax.GradientTransformation, dtype: Any = None
) -> tuple[optax.Params, Any]:
    """The same weights, and the state of their optimizer, in another dtype and under another rounding.

    Residuals are filled with what the dtype drops, so that `adamite.full_weights` stays what it was, to the precision
    of the rounding: 16 significant bits with "residual8", all of float32 with "residual16". Without a residual weights
    are rounded to the nearest. Moments and counts stay as they are.

    Works eagerly and under jit; arrays stay on their devices, sharded as they were.

    Args:
        params: the model's weights. Of Flax NNX, ``nnx.as_pure`` of them, and of the state.
        state: the state of their optimizer, of any rounding or none.
        tx: the optimizer that goes on: the same one, with another ``rounding``.
        dtype: that of the weights from now on; a function of the path and the leaf gives one for each leaf; None: each
            leaf keeps its dtype. It applies to real floating leaves.

    Returns:
        ``(params, state)``, from which `tx` continues. The state has `tx`'s structure. The count for the random bits
        of a rounding starts at 0 where there was none.

    Raises:
        ValueError: `state` differs from that of `tx` in more than the rounding (`adamite.convert_moments` converts
            moments), or its residuals are of other parameters; "residual16" is asked for float16 weights.
        TypeError: `tx` is no gradient transformation; `dtype` is no dtype; a leaf of `params` cannot be optimized.

    Example:
        >>> import adamite
        >>> params = {"w": jnp.array([1.001, -3.14159])}
        >>> state = adamite.adamw(1e-3).init(params)
        >>> lean = adamite.adamw(1e-3, rounding="residual8")
        >>> params, state = convert_weights(params, state, lean, "bfloat16")
        >>> print(params["w"], state[3].residual["w"], adamite.full_weights(params, state)["w"])
        [1 -3.14062] [33 16] [ 1.0010071 -3.1416016]
        >>> convert_weights(params, state, adamite.adamw(1e-3), "float32")[0]["w"].dtype.name
        'float32'
    """
    checks.differentiable(params, "params")
    checks.transformation("tx", tx)
    wanted = map_with_path(functools.partial(_wanted, dtype), params)
    like = wanted, jax.eval_shape(tx.init, wanted)
    tree = jax.tree.map(jnp.asarray, params), state
    _check_classes(state, like[1])
    likes = _by_path(like)
    change = changes(laid(tree), laid(like), [path for path in likes if path.startswith("[0]")])
    found = converted(_by_path(tree), change, likes)
    params, state = jax.tree.structure(like).unflatten(found[path] for path in likes)
    return params, settle(state, params)


class Laid(NamedTuple):
    """What a tree says of its weights. Paths are those of `jax.tree_util.keystr`."""

    leaves: Mapping[str, Any]
    """Arrays, abstract or not, or what else has their shapes and dtypes."""
    states: Iterable[str]
    """Where a `RoundingState` is."""
    absent: Iterable[str]
    """Where an ``optax.MaskedNode`` holds the place of an array."""


class Change(NamedTuple):
    """What is to be converted, by path."""

    weights: dict[str, tuple[str | None, str | None]]
    """For each weight the paths of its residual before and after."""
    counts: list[str]
    """Those of roundings that were not there."""


def laid(tree: Any) -> Laid:
    """What a tree says of its weights."""
    nodes = leaves_with_path(tree, lambda node: isinstance(node, RoundingState))
    states = [keystr(path) for path, node in nodes if isinstance(node, RoundingState)]
    marks = leaves_with_path(tree, lambda node: isinstance(node, optax.MaskedNode))
    absent = [keystr(path) for path, node in marks if isinstance(node, optax.MaskedNode)]
    return Laid(_by_path(tree), states, absent)


def changes(before: Laid, after: Laid, outside: Iterable[str]) -> Change:
    """What two trees keep in different ways.

    Args:
        before: the tree that is.
        after: the tree that is to be.
        outside: the paths of leaves that belong to no optimizer's state.

    Raises:
        ValueError: it cannot be told which weights a residual belongs to.
    """
    outside = [path for path in outside if path in before.leaves]
    if _kinds(before, outside) == _kinds(after, outside):
        return Change({}, [])
    old, new = _residuals(before, outside), _residuals(after, outside)
    weights: dict[str, tuple[str | None, str | None]] = {}
    for path in outside:
        was, now = before.leaves[path], after.leaves[path]
        if was.shape != now.shape or not all(jnp.issubdtype(x.dtype, jnp.floating) for x in (was, now)):
            continue
        one, other = old.get(path), new.get(path)
        dtypes = [(was.dtype, one and before.leaves[one].dtype), (now.dtype, other and after.leaves[other].dtype)]
        if one != other or dtypes[0] != dtypes[1]:
            weights[path] = one, other
    of_states = [path for state in after.states for path in after.leaves if path.startswith(state)]
    counts = [path for path in of_states if path not in before.leaves and after.leaves[path].dtype == jnp.int32]
    return Change(weights, counts)


def _kinds(tree: Laid, outside: Iterable[str]) -> dict[str, Any]:
    """The dtypes of weights and of what roundings keep of them."""
    states = tuple(tree.states)
    inside = [path for path in tree.leaves if states and path.startswith(states)]
    return {path: jnp.dtype(tree.leaves[path].dtype) for path in (*outside, *inside)}


def converted(leaves: dict[str, Any], change: Change, like: Mapping[str, Any]) -> dict[str, Any]:
    """`leaves`, the weights that change in the dtypes of `like`, with their residuals; new counts are 0."""
    found = leaves | {path: jnp.zeros((), jnp.int32) for path in change.counts}
    for path, (before, after) in change.weights.items():
        residual = found.pop(before, None) if before else None
        now = _rounded(found[path], residual, jnp.dtype(like[path].dtype), after and jnp.dtype(like[after].dtype))
        found[path] = now[0]
        if after:
            found[after] = now[1]
    return found


def keys(path: str) -> tuple[str, ...]:
    """The keys of a path of `jax.tree_util.keystr`; all of one that cannot be read is one key."""
    found = tuple(KEY.findall(path))
    return found if "".join(found) == path else (path,)


def _residuals(tree: Laid, outside: list[str]) -> dict[str, str]:
    """The path of each weight's residual, by that of the weight.

    The arrays of a state have the paths of their weights behind its own. What the state leaves out is marked as absent.
    """
    found: dict[str, str] = {}
    for state in tree.states:
        home = f"{state}.residual"
        theirs = {path[len(home) :]: x for path, x in tree.leaves.items() if path.startswith(home)}
        gone = tuple(path[len(home) :] for path in tree.absent if path.startswith(home))
        if not theirs:
            continue
        ends = next((end for end in theirs if any(path.endswith(end) for path in outside)), "/")
        roots = []
        for root in (path.removesuffix(ends) for path in outside if path.endswith(ends)):
            mine = {path[len(root) :]: tree.leaves[path] for path in outside if path.startswith(root)}
            both = mine.keys() & theirs.keys()
            left = [path for path in mine.keys() - both if not (gone and path.startswith(gone))]
            if both and not left and all(_fits(mine[path], theirs[path]) for path in both):
                roots.append((len(mine), _shared(root, home), root))
        best = [root for root in roots if root[:2] == max(roots)[:2]]
        if len(best) > 1:
            where = " or ".join(f"tree{root}" for *_, root in best)
            raise ValueError(
                f"the residuals of tree{state} could be those of {where}: "
                "restore what was saved, and let adamite.convert_weights convert it"
            )
        for *_, root in best:
            found |= {root + path: home + path for path in theirs if root + path in outside}
    return found


def _fits(weight: Any, residual: Any) -> bool:
    shape = weight.shape if jnp.dtype(weight.dtype) in SHORT else (1,) * len(weight.shape)
    return tuple(residual.shape) == tuple(shape) and jnp.dtype(residual.dtype) in RESIDUALS


def _shared(path: str, other: str) -> int:
    """How many keys two paths have in common."""
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(keys(path), keys(other), strict=False))
    return len(list(same))


@functools.partial(jax.jit, static_argnames=("dtype", "residual_dtype"))
def _rounded(p: jax.Array, residual: Any, dtype: Any, residual_dtype: Any) -> tuple[jax.Array, Any]:
    """A weight and its residual, None if there is none, in other dtypes."""
    theta = widen(p)
    if residual is not None and p.dtype in SHORT:
        theta = RESIDUALS[residual.dtype].weights(p, residual)
    if dtype not in SHORT:
        p = cast(theta, dtype)
        return p, residual_dtype and beside(p, jnp.zeros((1,) * p.ndim, residual_dtype))
    theta = cast(theta, jnp.float32)
    if not residual_dtype:
        return nearest(theta, dtype).astype(dtype), None
    middle = jnp.full_like(theta, 1 << 31, dtype=jnp.uint32)  # a half, in place of a random number: to the nearest
    p, residual = RESIDUALS[residual_dtype].round(theta, dtype, lambda: middle)
    return p.astype(dtype), residual


def _wanted(dtype: Any, path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
    """A weight in its new dtype, abstract."""
    now = jnp.asarray(leaf).dtype if not hasattr(leaf, "dtype") else leaf.dtype
    told: Any = dtype(path, leaf) if callable(dtype) and not isinstance(dtype, type) else dtype
    if told is not None and jnp.issubdtype(now, jnp.floating):
        now = checks.floating_dtype("dtype", told)
    return jax.ShapeDtypeStruct(jnp.shape(leaf), now)


def _by_path(tree: Any) -> dict[str, Any]:
    return {keystr(path): leaf for path, leaf in leaves_with_path(tree)}


def _check_classes(state: Any, like: Any) -> None:
    """Refuse a state of another optimizer."""
    ours, theirs = _without_roundings(state), _without_roundings(like)
    if jax.tree.structure(ours) != jax.tree.structure(theirs):
        where = difference(ours, "state", theirs, "tx.init(params)")
        raise ValueError(
            f"state must be that of tx but for the rounding: {where} "
            "(adamite.convert_moments converts moments, and should come first)"
        )
    for (path, x), (_, its) in zip(leaves_with_path(ours), leaves_with_path(theirs), strict=True):
        if x.shape != its.shape:
            raise ValueError(f"state{keystr(path)} must have the shape {its.shape} of tx's, got {x.shape}")


def _without_roundings(tree: Any) -> Any:
    """A tree without the states that a rounding adds to a chain, which are `EmptyState` for "nearest"."""
    children, structure = jax.tree.flatten(tree, is_leaf=lambda node: node is not tree)
    if structure == jax.tree.structure(0):
        return tree
    if type(tree) is tuple:
        return tuple(_without_roundings(x) for x in tree if not isinstance(x, (RoundingState, optax.EmptyState)))
    return structure.unflatten(map(_without_roundings, children))
