"""From a state dict of ``torch.optim.Adam`` or ``AdamW`` to the state of a transformation.

    exp_avg -> mu     exp_avg_sq -> nu     max_exp_avg_sq -> nu_max     step -> count, and those of schedules

The numbers stay the same; only the axes may lie otherwise.
"""

from collections.abc import Collection
from typing import Any

import jax
import numpy as np
import optax
from jax.tree_util import tree_map_with_path

from adamite import checks
from adamite.checks import RefusedError
from adamite.convert import stored_as
from adamite.interop.arguments import ARGUMENTS, arguments, check_same
from adamite.interop.names import Names, Place, path_name, places
from adamite.interop.rule_states import RULES, moments_of, rule_state
from adamite.interop.settings import common
from adamite.interop.state_dicts import MOMENTS, Kept, check_type, keys_of, numbers, parsed
from adamite.numerics import wide_dtype

SCHEDULES = (optax.ScaleByScheduleState, type(jax.eval_shape(optax.add_decayed_weights(lambda _: 0.0).init, ())))
"""What counts steps beside the moments."""

Arrays = dict[str, dict[str, np.ndarray]]


def from_torch(
    state_dict: Any, tx: Any, params: optax.Params, mapping: Names | None = None, *, allow: str | Collection[str] = ()
) -> optax.OptState:
    """The state with which `tx` goes on where a torch optimizer stopped.

    Everything is checked before anything is made: structure, names, settings, shapes and dtypes, and then that all
    numbers are finite and means of squares not negative.

    Args:
        state_dict: of ``torch.optim.Adam`` or ``AdamW``, with amsgrad or without; its tensors are torch's, NumPy's or
            JAX's, its keys numbers or, as FSDP gathers it, names. `read_torch` reads one from a file.
        tx: the transformation that goes on, with one Adam or AMSGrad in it: `torch_optimizer` makes it, or write it by
            hand. Guards, telemetry, accumulation, `adamite.sharding.zero1` and masks around it are filled through, and
            start themselves anew. Moments may be kept in any way.
        params: our parameters, arrays where they are to live.
        mapping: from our paths to torch's names or numbers, and axes: ``{"dense.kernel": ("dense.weight", (1, 0))}``;
            `flax_names` makes one. None: the names are the same. Where a state dict has no names it must be numbers;
            torch >= 2.6 keeps the names of ``AdamW(model.named_parameters())``.
        allow: arguments in which `tx` may differ from torch's settings: "learning_rate", "b1", "b2", "eps",
            "weight_decay", "decoupled", "mask" and others. Schedules are compared with nothing, nor are optax's own
            transformations, which do not say what they are.

    Returns:
        The state of `tx`, placed as ``tx.init(params)`` places it, with torch's moments and step. Before torch's first
        step it is what init gives.

    Raises:
        RefusedError: the state dict is damaged or foreign, or differs from `params` or `tx`; names what, and both.
        ValueError: `mapping` does not fit `params`; `tx` is no Adam that torch has; parameters are complex.
        TypeError: an argument is the wrong kind of thing.

    Example:
        >>> import jax.numpy as jnp
        >>> from adamite import adam
        >>> group = {"params": ["w"], "lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
        >>> kept = {"step": 7, "exp_avg": np.ones((3, 2), np.float32), "exp_avg_sq": np.ones((3, 2), np.float32)}
        >>> state_dict = {"state": {"w": kept}, "param_groups": [group | {"amsgrad": False}]}
        >>> state = from_torch(state_dict, adam(0.1), {"kernel": jnp.ones((2, 3))}, {"kernel": ("w", (1, 0))})
        >>> print(state[0].count, state[0].mu["kernel"].shape)
        7 (2, 3)
    """
    checks.transformation("tx", tx)
    allowed = checks.strings("allow", allow)
    for name in allowed:
        checks.one_of("allow", name, ARGUMENTS)
    found, spots = parsed(state_dict), places(params, mapping)
    keys = keys_of(found, spots)
    check_same(arguments(tx), found, keys, params, allowed)
    kept = {place.path: found.state[keys[place.path]] for place in spots}
    step = _step(kept)
    for place in spots:
        for name, tensor in kept[place.path].tensors.items():
            check_type(tensor, place, f"{name} of {place.path}")
    arrays = {place.path: _arrays(kept[place.path], place) for place in spots}

    blank = rule_state(jax.eval_shape(tx.init, params))
    _check_rule(blank, arrays, common(found.settings).amsgrad)
    state = tx.init(params)
    if not any(arrays.values()):  # torch has not begun
        return state

    def filled(node: Any) -> Any:
        if isinstance(node, SCHEDULES):
            return node._replace(count=_beside(node.count, np.int32(step)))
        if not isinstance(node, RULES):
            return node
        columns = {name: _column(moments_of(node, name), arrays, MOMENTS[name]) for name in node._fields[1:]}
        return node._replace(count=_beside(node.count, np.int32(step)), **columns)

    return stored_as(jax.tree.map(filled, state, is_leaf=lambda node: isinstance(node, (*RULES, *SCHEDULES))), state)


def _step(kept: dict[str, Kept]) -> int:
    """The step of all parameters that have begun."""
    begun = {path: one.step for path, one in kept.items() if one.tensors}
    first = next(iter(begun), "")
    for path, step in begun.items():
        if step != begun[first]:
            raise RefusedError(f"all parameters must be at one step, got {first} at {begun[first]}, {path} at {step}")
    return begun.get(first, 0)


def _arrays(kept: Kept, place: Place) -> dict[str, np.ndarray]:
    """Torch's moments of a parameter, as they lie here."""
    found = {}
    for name, tensor in kept.tensors.items():
        array = numbers(tensor, f"{name} of {place.path}", unsigned=name != "exp_avg")
        # A copy: JAX may keep the memory that it is given, and torch writes its own anew at the next step.
        found[name] = np.array(place.ours(array), wide_dtype(place.leaf.dtype), order="C")
    return found


def _check_rule(node: Any, arrays: Arrays, amsgrad: bool) -> None:
    """Refuse a transformation that keeps other moments than torch, or of other parameters."""
    if isinstance(node, optax.ScaleByAmsgradState) != amsgrad:
        raise RefusedError(f"amsgrad: torch has {amsgrad}, tx {not amsgrad}")
    own = {path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(moments_of(node, "mu"))}
    begun = {path for path, one in arrays.items() if one}
    for path in sorted(begun - own):
        raise RefusedError(f"torch has moments of {path}, tx leaves it out")
    for path in sorted(own - begun if begun else ()):
        raise RefusedError(f"torch has no moments of {path} yet, but of others: leave it out of tx with optax.masked")


def _column(like: Any, arrays: Arrays, name: str) -> Any:
    """One moment of all parameters, where `like` is."""
    return tree_map_with_path(lambda path, x: _beside(x, arrays[path_name(path)][name]), like)


def _beside(like: Any, x: Any) -> jax.Array:
    """A moment or a count on the devices of `like`."""
    return jax.device_put(x, like.sharding if like.committed else None)
