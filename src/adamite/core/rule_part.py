"""The kinds of parts: a rule with its moments, a change by a number, the rounding of weights. Knows no algorithm."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adamite import checks
from adamite.core.matching import counterparts, difference, same_rank
from adamite.core.part import Part
from adamite.core.placement import beside
from adamite.core.tree_pass import Leafwise, leafwise
from adamite.numerics import as_array, as_wide_as, constants, is_none
from adamite.paths import leaves_with_path, unwrapped
from adamite.random_bits import fold
from adamite.storage import Quantized, Storage, choose


class Rule(NamedTuple):
    """One step of an algorithm, as pure functions that know no storage, tree, device or dtype."""

    scalars: Callable[..., tuple[jax.typing.ArrayLike, ...]]
    """``scalars(t)``: what depends on the step number t = 1, 2, ... (int32, shape (); see `first`) alone, computed once
    a step. It takes as many numbers as the state has counts: mostly one."""

    step: Callable[..., tuple[jax.Array, ...]]
    """``step(scalars, g, *moments) -> (direction, *moments)``, on arrays of at least float32 and
    of the shape of g, or of that which the moment's storage keeps."""

    elementwise: bool = True
    """Whether an element of the results depends on the same element of the arguments alone."""

    first: int = 1
    """The number of the first step: 1, or 0 where the paper counts from 0."""


class Counted(NamedTuple):
    """The state of a rule that counts no steps, where a storage needs them for its random bits."""

    count: Any  # int32, shape ()
    inner: Any  # the rule's own state


def from_rule(
    rule: Rule, state_class: type[Any], defaults: Mapping[str, Storage], moments: Any = "float32"
) -> Leafwise:
    """The gradient transformation that runs `rule` over a tree of parameters.

    Args:
        rule: the algorithm.
        state_class: a NamedTuple with one field for each moment; all other fields are counts of steps.
        defaults: how each moment is kept in float32, by its field's name, in the order in which the rule takes them.
        moments: how they are kept, see `adamite.storage.choose`.

    Raises:
        ValueError: the step is not elementwise, and `moments` is not "float32"; or `choose` refuses it.
        TypeError: `choose` refuses it.
    """
    if not (rule.elementwise or (isinstance(moments, str) and moments == "float32")):
        raise ValueError(f"moments must be 'float32' here, where a step needs the whole leaf, got {moments!r:.80}")
    storages = choose(moments, defaults)
    count_names = [name for name in state_class._fields if name not in storages]
    apart = not count_names and any(storage.seed is not None for storage in storages.values())

    def init(params: optax.Params) -> Any:
        checks.differentiable(params, "params")
        counts = {name: jnp.zeros((), jnp.int32) for name in count_names}
        state = state_class(**counts, **{name: _fresh(storage, params) for name, storage in storages.items()})
        return Counted(jnp.zeros((), jnp.int32), state) if apart else state

    def begin(updates: optax.Updates, state: Any, params: optax.Params | None) -> tuple[Any, list[Any]]:
        own = state.inner if apart and isinstance(state, Counted) else state
        if not isinstance(own, state_class) or (apart and own is state):
            raise TypeError(
                f"state must be a {Counted.__name__ if apart else state_class.__name__}, got {type(state).__name__}"
            )
        checks.differentiable(updates, "updates")
        if params is not None:
            counterparts(updates, params, "params")
        columns = [_column(storage, updates, getattr(own, name), name) for name, storage in storages.items()]
        before = [getattr(own, name) for name in count_names]
        counts = [optax.safe_increment(count) for count in before]
        number: Any = optax.safe_increment(state.count) if apart else counts[0] if counts else 0
        keys = [None if s.seed is None else fold(fold(s.seed, number), i) for i, s in enumerate(storages.values())]
        return (rule.scalars(*(counts if rule.first else before)), keys), list(zip(*columns, strict=True))

    def step(scalars: Any, g: jax.Array, p: Any, stored: Any, bits: Any) -> tuple[jax.Array, Any]:
        del p
        numbers, keys = scalars
        numbers, kept = tuple(as_wide_as(g, number) for number in numbers), tuple(storages.values())
        with constants():
            moments = [s.decode(x) for s, x in zip(kept, stored, strict=True)]
        u, *new = rule.step(numbers, g, *moments)
        draws = [functools.partial(bits, key) for key in keys]
        with constants():
            return u, tuple(s.encode(m, x, draw) for s, m, x, draw in zip(kept, new, stored, draws, strict=True))

    def end(state: Any, columns: list[Any], structure: Any) -> Any:
        if apart:
            return Counted(optax.safe_increment(state.count), end_own(state.inner, columns, structure))
        return end_own(state, columns, structure)

    def end_own(own: Any, columns: list[Any], structure: Any) -> Any:
        counts = {name: optax.safe_increment(getattr(own, name)) for name in count_names}
        moments = zip(*columns, strict=True) if columns else [()] * len(storages)
        trees = {name: _tree(s, column, structure) for (name, s), column in zip(storages.items(), moments, strict=True)}
        return state_class(**counts, **trees)

    block = max(storage.block for storage in storages.values())
    lean = block > 1 or any(storage.seed is not None for storage in storages.values())  # but not Optax's mu_dtype

    def few_bits(stored: Any) -> bool:
        return lean and any(x.dtype.itemsize < 4 for x in jax.tree.leaves(stored))

    return leafwise(
        Part(
            init, begin, step, end,
            block=block, in_slices=block > 1, few_bits=few_bits, elementwise=rule.elementwise,
        )
    )  # fmt: skip


def _fresh(storage: Storage, params: optax.Params) -> Any:
    """A moment of all parameters."""
    column = []
    for path, param in leaves_with_path(params):
        leaf = param if isinstance(param, jax.ShapeDtypeStruct) else as_array(param)
        column.append(beside(leaf, storage.fresh(leaf, path)))
    return _tree(storage, column, jax.tree.structure(params))


def _tree(storage: Storage, column: Any, structure: Any) -> Any:
    """A moment of all leaves: a tree, or a `form` of trees."""
    if storage.form is None:
        return structure.unflatten(column)
    return storage.form(*(structure.unflatten([x[i] for x in column]) for i in range(len(storage.form._fields))))


def _column(storage: Storage, updates: Any, tree: Any, name: str) -> list[Any]:
    """A moment of each leaf of `updates`."""
    if isinstance(tree, Quantized) != (storage.form is Quantized):
        ours, theirs = ("in blocks", "as arrays") if storage.form else ("as arrays", "in blocks")
        raise ValueError(
            f"{name} is kept {theirs} in this state, but moments= of this optimizer keeps it {ours}: "
            "adamite.convert_moments turns one into the other"
        )
    if storage.form is None:
        return counterparts(updates, tree, name, storage.fits)
    first, *others = storage.form._fields
    columns = [counterparts(updates, getattr(tree, first), f"{name}.{first}", storage.fits)]
    for field in others:
        columns.append(counterparts(updates, getattr(tree, field), f"{name}.{field}", same_rank))
    return [storage.form(*arrays) for arrays in zip(*columns, strict=True)]


def by_number(
    change: Callable[[jax.Array, Any, Any], jax.Array],
    number: Any,
    *,
    sign: int = 1,
    counted: type[Any] = optax.ScaleByScheduleState,
    mask: Any = None,
    needs_params: str = "",
    note: Callable[[Any, Any], None] | None = None,
) -> Leafwise:
    """The transformation ``u <- change(u, p, s)``, where s is `number`, or what that schedule says, times a sign.

    Args:
        change: a function of one leaf: the update u, the parameter p of at least float32 and the number.
        number: a number, or a function from the number of updates so far (int32, shape ()) to one.
        sign: 1 or -1.
        counted: the state with a schedule, a NamedTuple of the field ``count``; without one it is ``optax.EmptyState``.
        mask: which leaves to change: None for all, a tree of booleans, a prefix of the parameters' structure, or a
            function from a tree to one. The state is then inside an ``optax.MaskedState``, as `optax.masked` has it.
        needs_params: what to say when `params` is missing; empty if it may be.
        note: ``note(number, state)`` is called with each state that is made. None: nothing is.
    """
    masked = mask is not None

    def init(params: optax.Params) -> Any:
        if masked:
            _flags(mask, params)
        state = counted(count=jnp.zeros((), jnp.int32)) if callable(number) else optax.EmptyState()
        if note is not None:
            note(number, state)
        return optax.MaskedState(state) if masked else state

    def begin(updates: optax.Updates, state: Any, params: optax.Params | None) -> tuple[Any, list[Any]]:
        if needs_params and params is None:
            raise ValueError(f"{needs_params}: call update(updates, state, params)")
        inner = state.inner_state if masked else state
        s: Any = number(inner.count) if callable(number) else number
        flags = _flags(mask, updates) if masked else [True] * len(jax.tree.leaves(updates, is_leaf=is_none))
        return sign * s, [() if flag else None for flag in flags]

    def step(s: Any, u: jax.Array, p: Any, stored: Any, bits: Any) -> tuple[jax.Array, Any]:
        del bits
        if stored is None:
            return u, None
        return change(u, p, as_wide_as(u, s)), stored

    def end(state: Any, columns: list[Any], structure: Any) -> Any:
        del columns, structure
        if not callable(number):
            return state
        inner = state.inner_state if masked else state
        inner = inner._replace(count=optax.safe_increment(inner.count))
        return optax.MaskedState(inner) if masked else inner

    return leafwise(Part(init, begin, step, end))


def _flags(mask: Any, tree: Any) -> list[bool]:
    """The mask for each leaf, None being one. A tree of none is `optax.tree_map_params` asking for a state's form."""
    mask, tree = unwrapped(mask), unwrapped(tree)
    if callable(mask):
        mask = mask(tree)
    if not jax.tree.leaves(tree):
        return []
    try:
        return jax.tree.leaves(
            jax.tree.map(lambda on, sub: jax.tree.map(lambda _: bool(on), sub, is_leaf=is_none), mask, tree)
        )
    except ValueError:
        first = difference(mask, "mask", tree, "params", prefix=True)
        raise ValueError(f"mask must have the structure of params or a prefix of it: {first}") from None
