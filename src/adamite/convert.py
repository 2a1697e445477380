"""A state's moments from one storage to another, between two steps.

    value  <- decode(stored)                        float32
    stored <- encode(value)                         rounded to the nearest

A run that optax began in float32 goes on lean, and a lean one ends as a float32 checkpoint. Decoding is exact: what a
code stands for is a float32. So is what follows it: a value that came from a code becomes that code again, as long as
it is no smaller than the smallest normal float32.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.tree_util import KeyPath, keystr, tree_map_with_path

from adamite.core.matching import difference
from adamite.core.placement import beside, settle
from adamite.core.rule_part import Counted
from adamite.paths import leaves_with_path
from adamite.storage import Blockwise, Dense, Quantized, Storage, choose

UNSIGNED = {"mu": False, "m1": False, "m2": False, "trace": False, "nu": True, "nu_max": True, "sum_of_squares": True}
"""The fields that are moments, and whether they are >= 0."""


def convert_moments(state: Any, moments: Any) -> Any:
    """The same state with its moments kept in another way.

    Moments are the fields ``mu``, ``m1``, ``m2`` and ``trace``, and, >= 0, ``nu``, ``nu_max`` and ``sum_of_squares`` of
    a NamedTuple that has only counts beside them: the states of optax's and adamite's algorithms. They are found
    anywhere inside `state`: in chains, `optax.masked`, `optax.MultiSteps`, `optax.inject_hyperparams`, a Flax
    ``TrainState``. All else stays as it is.

    Works eagerly, leaf by leaf, and under jit; arrays stay on their devices, sharded as they were, and scales are
    sharded as their codes are where that divides them. For abstract states use `jax.eval_shape`.

    Args:
        state: an optimizer's state. One restored without a target consists of dicts, in which nothing is found: restore
            it into ``jax.eval_shape(tx.init, params)``.
        moments: how to keep them, as `adamite.scale_by_adam` takes it. A function is given the path of a leaf in the
            parameters, and the moment's values, of at least float32, in place of the parameter. "float32" gives optax's
            own layout.

    Returns:
        The state that an optimizer with these `moments` continues from. RMSProp, Adagrad and SGD count no steps; where
        random bits need a count, that starts at 0, and it is dropped where none do.

    Raises:
        ValueError: `moments` is unknown; there are no moments in the state; a moment has not the parameters' shapes, as
            ``nu`` of `adamite.adam_mini`, and would have to change; a complex one cannot be kept so.
        TypeError: `moments` is something else.

    Example:
        optax takes the first step in 8 bytes per parameter, adamite the second in 2.03:

        >>> import optax
        >>> import adamite
        >>> params, g = jnp.ones((16, 256)), jnp.full((16, 256), 0.5)
        >>> _, state = optax.adam(0.1).update(g, optax.adam(0.1).init(params))
        >>> state = convert_moments(state, "int8")
        >>> sum(x.nbytes for x in jax.tree.leaves(state)) / params.size
        2.0322265625
        >>> updates, state = adamite.adam(0.1, moments="int8").update(g, state)
        >>> print(updates[0, :3].round(3), convert_moments(state, "float32")[0].mu[0, :3])
        [-0.1 -0.1 -0.1] [0.095 0.095 0.095]
    """
    nodes, structure = jax.tree.flatten(state, is_leaf=is_rule_state)
    if not any(map(is_rule_state, nodes)):
        first = next((f", the first at state{keystr(path)}" for path, _ in leaves_with_path(state)), "")
        raise ValueError(
            f"state must hold moments, the fields {', '.join(UNSIGNED)} of an optimizer's NamedTuples, "
            f"got a {type(state).__name__} of {len(jax.tree.leaves(state))} leaves{first}"
        )
    return structure.unflatten(_converted(node, moments) if is_rule_state(node) else node for node in nodes)


def stored_as(state: Any, like: Any) -> Any:
    """`state` with its moments kept as those of `like`, which may be abstract.

    Raises:
        ValueError: `like` is a state of another optimizer, or of other parameters.
    """
    nodes, structure = jax.tree.flatten(state, is_leaf=is_rule_state)
    likes, wanted = jax.tree.flatten(like, is_leaf=is_rule_state)
    if structure != wanted:
        ours, theirs = (x.unflatten(range(x.num_leaves)) for x in (structure, wanted))
        raise ValueError(f"state and like differ in structure: {difference(ours, 'state', theirs, 'like')}")
    return wanted.unflatten(
        _node_as(node, one) if is_rule_state(one) else node for node, one in zip(nodes, likes, strict=True)
    )


def decoded(state: Any) -> Any:
    """`state`, each moment that is in blocks as a tree of float32 arrays. To look at: no optimizer takes it."""

    def one(path: KeyPath, node: Any) -> Any:
        if not isinstance(node, Quantized):
            return node
        keeper = _keeper(node, UNSIGNED[getattr(path[-1], "name", "")])
        return jax.tree.map(lambda codes, scales: keeper.decode(Quantized(codes, scales)), node.codes, node.scales)

    return tree_map_with_path(one, state, is_leaf=lambda node: isinstance(node, Quantized))


def is_rule_state(node: Any) -> bool:
    """Whether it is a rule's state: a NamedTuple of moments and of counts."""
    own = node.inner if isinstance(node, Counted) else node
    fields: dict[str, Any] = getattr(own, "_asdict", dict)()
    counts = [x for name, x in fields.items() if name not in UNSIGNED]
    return len(counts) < len(fields) and all(
        getattr(x, "shape", None) == () and jnp.issubdtype(x.dtype, jnp.integer) for x in counts
    )


def _converted(node: Any, moments: Any) -> Any:
    """A rule's state."""
    own = node.inner if isinstance(node, Counted) else node
    names = [name for name in own._fields if name in UNSIGNED]
    storages = choose(moments, {name: Dense(unsigned=UNSIGNED[name]) for name in names})
    new = own._replace(**{name: _moment(getattr(own, name), UNSIGNED[name], storages[name]) for name in names})
    if any(getattr(new, name) is not getattr(own, name) for name in names):
        for name in names[1:]:
            _check_shapes(own, names[0], name)
    if len(names) < len(own) or all(storages[name].seed is None for name in names):
        return new
    count = node.count if isinstance(node, Counted) else jnp.zeros((), jnp.int32)
    return settle(Counted(count, new), new)


def _node_as(node: Any, like: Any) -> Any:
    """A rule's state, its moments kept as those of another."""
    own, its = (x.inner if isinstance(x, Counted) else x for x in (node, like))
    if type(own) is not type(its):
        raise ValueError(f"state must be a {type(its).__name__}, got {type(own).__name__}")
    new = own
    for name in (name for name in own._fields if name in UNSIGNED):
        moment, target = getattr(own, name), getattr(its, name)
        values, others = _values(moment), _values(target)
        if jax.tree.structure(values) != jax.tree.structure(others):
            where = difference(values, name, others, f"like's {name}")
            raise ValueError(f"{name} must have the structure of the parameters: {where}")
        wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), _column(target))
        new = new._replace(**{name: _recoded(moment, wanted, UNSIGNED[name], isinstance(target, Quantized))})
    if not isinstance(like, Counted):
        return new
    count = node.count if isinstance(node, Counted) else jnp.zeros((), jnp.int32)
    return settle(Counted(count, new), new)


def _moment(moment: Any, unsigned: bool, storage: Storage) -> Any:
    """A moment of all leaves; the same object if it is kept so already."""
    column, paths = _column(moment), [path for path, _ in leaves_with_path(_values(moment))]
    return _recoded(moment, _wanted(column, paths, unsigned, storage), unsigned, storage.form is Quantized)


def _recoded(moment: Any, wanted: list[Any], unsigned: bool, quantized: bool) -> Any:
    """A moment of all leaves in the shapes and dtypes wanted of each; the same object if it has them."""
    column, structure = _column(moment), jax.tree.structure(_values(moment))
    if isinstance(moment, Quantized) == quantized and _types(column) == _types(wanted):
        return moment
    column = [beside(_values(x), _convert(x, like, unsigned)) for x, like in zip(column, wanted, strict=True)]
    if not quantized:
        return structure.unflatten(column)
    return Quantized(*(structure.unflatten([x[i] for x in column]) for i in range(2)))


def _column(moment: Any) -> list[Any]:
    """What is stored of each leaf."""
    if isinstance(moment, Quantized):
        return list(map(Quantized, jax.tree.leaves(moment.codes), jax.tree.leaves(moment.scales)))
    return jax.tree.leaves(moment)


def _values(moment: Any) -> Any:
    """The arrays that have the parameters' shapes."""
    return moment.codes if isinstance(moment, Quantized) else moment


def _wanted(column: list[Any], paths: list[KeyPath], unsigned: bool, storage: Storage) -> list[Any]:
    """The shapes and dtypes in which the leaves' moments are to be kept."""

    def fresh(column: list[Any]) -> list[Any]:
        leaves = [_keeper(x, unsigned).decode(x) for x in column]
        return [storage.fresh(leaf, path) for leaf, path in zip(leaves, paths, strict=True)]

    return jax.eval_shape(fresh, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), column))


def _keeper(stored: Any, unsigned: bool) -> Storage:
    """What decodes a leaf's moment and encodes in its form, which its dtypes tell: to the nearest, without a seed."""
    return (Blockwise if isinstance(stored, Quantized) else Dense)(seed=None, unsigned=unsigned)


@functools.partial(jax.jit, static_argnames=("like", "unsigned"))
def _convert(stored: Any, like: Any, unsigned: bool) -> Any:
    """A leaf's moment in the form of `like`, sharded as it was."""

    def one(stored: Any, blank: Any) -> Any:
        x = _keeper(stored, unsigned).decode(stored)
        return _keeper(blank, unsigned).encode(x, blank, lambda: jnp.uint32(0))

    def ones(x: Any) -> jax.Array:
        return jnp.ones_like(values, x.dtype) if x.shape == values.shape else jnp.ones(x.shape, x.dtype)

    values = _values(stored)
    blank = beside(values, jax.tree.map(ones, like))
    if AxisType.Explicit not in jax.typeof(values).sharding.mesh.axis_types:
        return one(stored, blank)
    shardings = jax.tree.map(lambda x: jax.typeof(x).sharding, blank)
    placed: Any = jax.sharding.auto_axes(one, out_sharding=shardings)  # explicit types know no blocks
    return placed(stored, blank)


def _types(column: list[Any]) -> list[tuple[tuple[int, ...], jnp.dtype]]:
    return [(x.shape, x.dtype) for x in jax.tree.leaves(column)]


def _check_shapes(own: Any, first: str, name: str) -> None:
    """Refuse moments that are not elementwise."""
    one, other = (
        {keystr(path): x.shape for path, x in leaves_with_path(_values(getattr(own, field)))} for field in (first, name)
    )
    for where in sorted(one.keys() | other.keys()):
        if one.get(where) != other.get(where):
            raise ValueError(
                f"{name}{where} has shape {other.get(where)} and {first}{where} {one.get(where)}: "
                "moments that are averages of several elements, as Adam-mini's, are kept in float32 only"
            )
