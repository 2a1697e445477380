"""From a state dict of ``torch.optim.Adam`` or ``AdamW`` to the state of a transformation.

    exp_avg -> mu     exp_avg_sq -> nu     max_exp_avg_sq -> nu_max     step -> count

The numbers stay the same; only the axes may lie otherwise. In `optax.partition` each group has a state of Adam with its
own count. Schedules count on from the largest step: torch's schedulers know one for all groups.
"""

from collections.abc import Collection
from typing import Any

import jax
import numpy as np
import optax

from adamite import checks
from adamite.checks import RefusedError
from adamite.convert import stored_as
from adamite.interop.arguments import ARGUMENTS, arguments
from adamite.interop.comparison import check_same
from adamite.interop.names import Names, Place, path_name, places
from adamite.interop.rule_states import RULES, check_amsgrad, distinct, moments_of, paths_of, rule_states
from adamite.interop.state_dicts import MOMENTS, Kept, check_type, keys_of, numbers, parsed
from adamite.numerics import wide_dtype
from adamite.paths import map_with_path

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
        tx: the transformation that goes on: `torch_optimizer` makes it, or write it by hand. It has one Adam or AMSGrad
            for each parameter: one for all, or one for each group of a `partition`, of `optax.partition` or
            `optax.masked`. Guards, telemetry, accumulation and `adamite.sharding.zero1` around it are filled through,
            and start themselves anew. Moments may be kept in any way.
        params: all our parameters, arrays where they are to live. Torch need not have those that `tx` leaves out.
        mapping: from our paths to torch's names or numbers, and axes: ``{"dense.kernel": ("dense.weight", (1, 0))}``;
            `flax_names` makes one. None: the names are the same. Torch >= 2.6 keeps the names of
            ``AdamW(model.named_parameters())``. A state dict without names has numbers: those of the parameters in the
            order in which the optimizer got them, group by group. The mapping must then give numbers:
            ``{"dense.kernel": (0, (1, 0)), "dense.bias": 1}``. What `tx` leaves out needs no entry.
        allow: arguments in which `tx` may differ from torch's settings: "learning_rate", "b1", "b2", "eps",
            "weight_decay", "decoupled", "mask" and others. Each parameter's are compared with those of torch's group.
            Schedules are compared with nothing, nor are optax's own transformations, which do not say what they are;
            but torch's groups must then agree, where one Adam of `tx` steps several of them.

    Returns:
        The state of `tx`, placed as ``tx.init(params)`` places it, with torch's moments and steps. Schedules go on from
        the largest step. Before torch's first step it is what init gives.

    Raises:
        RefusedError: the state dict is damaged or foreign, or differs from `params` or `tx`; names what, and both.
        ValueError: `mapping` does not fit `params`; `tx` is no Adam that torch has; parameters are complex.
        TypeError: an argument is the wrong kind of thing.

    Example:
        >>> import jax.numpy as jnp
        >>> from adamite import adam
        >>> group = {"params": [0, 1], "lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
        >>> weight, bias = np.ones((3, 2), np.float32), np.ones(3, np.float32)  # the order of model.parameters()
        >>> kept = {n: {"step": 7, "exp_avg": x, "exp_avg_sq": x} for n, x in enumerate([weight, bias])}
        >>> state_dict = {"state": kept, "param_groups": [group | {"amsgrad": False}]}
        >>> params, numbers = {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}, {"kernel": (0, (1, 0)), "bias": 1}
        >>> state = from_torch(state_dict, adam(0.1), params, numbers)
        >>> print(state[0].count, state[0].mu["kernel"].shape)
        7 (2, 3)
    """
    checks.transformation("tx", tx)
    allowed = checks.strings("allow", allow)
    for name in allowed:
        checks.one_of("allow", name, ARGUMENTS)
    found, every = parsed(state_dict), {place.path for place in places(params, None)}
    rules = rule_states(jax.eval_shape(tx.init, params))
    spots = places(params, mapping, optional=every - rules.keys())
    keys = keys_of(found, spots, every - rules.keys())
    stepped = [place for place in spots if place.path in rules]
    check_same(arguments(tx, params, rules), found, {place.path: keys[place.path] for place in stepped}, allowed)
    kept = {path: found.state[key] for path, key in keys.items()}
    _check_begun(kept, rules)
    steps = {path: step for rule in distinct(rules) for path, step in _steps(kept, paths_of(rule)).items()}
    for place in stepped:
        check_amsgrad(rules[place.path], found.settings[found.groups[keys[place.path]]].amsgrad, place.path)
        for name, tensor in kept[place.path].tensors.items():
            check_type(tensor, place, f"{name} of {place.path}")
    arrays = {place.path: _arrays(kept[place.path], place) for place in stepped}

    state = tx.init(params)
    if not any(arrays.values()):  # torch has not begun
        return state

    def filled(node: Any) -> Any:
        if isinstance(node, SCHEDULES):
            return node._replace(count=_beside(node.count, np.int32(max(steps.values()))))
        paths = paths_of(node) if isinstance(node, RULES) else []
        if not paths:
            return node
        columns = {name: _column(moments_of(node, name), arrays, MOMENTS[name]) for name in node._fields[1:]}
        return node._replace(count=_beside(node.count, np.int32(steps[paths[0]])), **columns)

    return stored_as(jax.tree.map(filled, state, is_leaf=lambda node: isinstance(node, (*RULES, *SCHEDULES))), state)


def _arrays(kept: Kept, place: Place) -> dict[str, np.ndarray]:
    """Torch's moments of a parameter, as they lie here."""
    found = {}
    for name, tensor in kept.tensors.items():
        array = numbers(tensor, f"{name} of {place.path}", unsigned=name != "exp_avg")
        # A copy: JAX may keep the memory that it is given, and torch writes its own anew at the next step.
        found[name] = np.array(place.ours(array), wide_dtype(place.leaf.dtype), order="C")
    return found


def _check_begun(kept: dict[str, Kept], rules: dict[str, Any]) -> None:
    """Refuse a transformation that keeps moments of other parameters than torch."""
    begun = {path for path, one in kept.items() if one.tensors}
    for path in sorted(begun - rules.keys()):
        raise RefusedError(f"torch has moments of {path}, tx leaves it out")
    for path in sorted(rules.keys() - begun if begun else ()):
        raise RefusedError(
            f"torch has no moments of {path} yet, but of others: if torch does not train it, freeze it: "
            f"torch_optimizer(..., frozen={path!r}), or optax.set_to_zero() in optax.partition"
        )


def _steps(kept: dict[str, Kept], paths: list[str]) -> dict[str, int]:
    """The step of each parameter of one state of Adam, the same for all; 0 if torch has not begun."""
    for path in paths:
        if kept[path].step != kept[paths[0]].step:
            raise RefusedError(
                f"all parameters that one Adam steps must be at one step, got {paths[0]} at {kept[paths[0]].step}, "
                f"{path} at {kept[path].step}"
            )
    return {path: kept[path].step for path in paths}


def _column(like: Any, arrays: Arrays, name: str) -> Any:
    """One moment of all parameters, where `like` is."""
    return map_with_path(lambda path, x: _beside(x, arrays[path_name(path)][name]), like)


def _beside(like: Any, x: Any) -> jax.Array:
    """A moment or a count on the devices of `like`."""
    return jax.device_put(x, like.sharding if like.committed else None)
