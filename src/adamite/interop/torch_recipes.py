"""What a torch optimizer does, as a transformation.

    torch's                      a chain of
    Adam                         scale_by_adam,                         scale_by_learning_rate
    Adam with weight_decay       add_decayed_weights,  scale_by_adam,   scale_by_learning_rate
    AdamW                        scale_by_adam,  add_decayed_weights,   scale_by_learning_rate
    amsgrad=True                 scale_by_amsgrad(max_before_correction=True) in place of scale_by_adam

Groups that differ in nothing but whether they decay are one chain, with a mask. Others are a `partition` with a chain
for each group. One chain with numbers for each leaf would not do: a state of Adam has one count and one pair of betas,
and a group that torch added later is at a step of its own.
"""

from collections.abc import Callable, Collection
from typing import Any

import optax

from adamite import checks
from adamite.algorithms.adam import scale_by_adam
from adamite.algorithms.amsgrad import scale_by_amsgrad
from adamite.core import Optimizer, chain
from adamite.grouping import partition
from adamite.interop.names import Names, path_name, places, some
from adamite.interop.settings import Settings, checked
from adamite.interop.state_dicts import StateDict, keys_of, parsed
from adamite.learning_rate import scale_by_learning_rate
from adamite.numerics import is_none
from adamite.paths import map_with_path
from adamite.regularization import add_decayed_weights


def torch_optimizer(
    state_dict: Any,
    params: optax.Params | None = None,
    mapping: Names | None = None,
    *,
    decoupled: bool | None = None,
    lr_lambda: Any = None,
    frozen: str | Collection[str] = (),
    moments: Any = "float32",
    rounding: Any = None,
) -> Optimizer:
    """The transformation that does what the torch optimizer of this state dict does.

    Args:
        state_dict: of ``torch.optim.Adam`` or ``AdamW``, as `from_torch` takes it. Numbers may be tensors of shape ().
        params: our parameters; needed where torch's groups differ, and with `frozen`.
        mapping: see `from_torch`; it goes with `params`.
        decoupled: whether the decay is AdamW's, or L2 in the gradient, for torch < 2.6, whose state dicts do not say.
        lr_lambda: as of ``torch.optim.lr_scheduler.LambdaLR``: a function from the step count (int32, shape (); traced
            under jit) to a factor, or a list of one for each of torch's groups. A group's learning rate is the factor
            times its ``initial_lr``, which torch's schedulers write into the state dict; times its ``lr`` if it has
            none. None: the rates stay the numbers that torch has now; no optimizer of torch's knows its schedule.
        frozen: paths of arrays in `params` that are to stay as they are, or of subtrees: "head" is "head.kernel" and
            "head.bias". Torch need not have them, and `mapping` needs no entry for them.
        moments: how they are kept, see `adamite.scale_by_adam`.
        rounding: of weights of 16 bits, see `adamite.round_weights`.

    Returns:
        The transformation. If torch's groups differ in nothing but whether they decay, and nothing is frozen, it is an
        `adamite.chain`. Else it is a `partition` into "group0", "group1", ..., as torch has them, and "frozen".

    Raises:
        RefusedError: the state dict is damaged or foreign; it maximizes; torch has a parameter that `params` has not,
            or `params` an array that torch has not and that is not frozen.
        ValueError: `decoupled` is missing, or contradicts the state dict; `params` is missing; `params` has nothing
            that `frozen` names; `lr_lambda` has not one function for each group.
        TypeError: an argument is the wrong kind of thing.

    Example:
        >>> import jax.numpy as jnp
        >>> both = {"betas": (0.9, 0.99), "eps": 1e-8, "amsgrad": False, "decoupled_weight_decay": True}
        >>> body, head = {"params": [0], "lr": 0.1, "weight_decay": 0.5}, {"params": [1], "lr": 0.2, "weight_decay": 0}
        >>> params = {"body": jnp.array(2.0), "extra": jnp.array(2.0), "head": jnp.array(2.0)}
        >>> state_dict = {"state": {}, "param_groups": [body | both, head | both]}
        >>> tx = torch_optimizer(state_dict, params, {"body": 0, "head": 1}, frozen="extra")
        >>> updates, _ = tx.update({path: jnp.array(1.0) for path in params}, tx.init(params), params)
        >>> print({path: round(float(u), 3) for path, u in updates.items()})
        {'body': -0.2, 'extra': 0.0, 'head': -0.2}
    """
    decoupled = None if decoupled is None else checks.flag("decoupled", decoupled)
    names = checks.strings("frozen", frozen)
    found = parsed(state_dict)
    rates = _rates(state_dict["param_groups"], found, lr_lambda)

    def recipe(its: Settings, rate: Any, mask: Any = None) -> Optimizer:
        if its.amsgrad:
            direction = scale_by_amsgrad(its.b1, its.b2, its.eps, max_before_correction=True, moments=moments)
        else:
            direction = scale_by_adam(its.b1, its.b2, its.eps, moments=moments)
        parts = [direction, scale_by_learning_rate(_scheduled(*rate))]
        if its.weight_decay:
            parts.insert(1 if _decoupled(its, decoupled) else 0, add_decayed_weights(its.weight_decay, mask))
        return chain(*parts, rounding=rounding)

    alike = not names and _alike(found, rates)
    if alike and len({bool(its.weight_decay) for its in found.settings}) == 1:
        return recipe(found.settings[0], rates[0])
    if params is None:
        why = "frozen is" if names else "torch's groups differ, in whether they decay or in more"
        raise ValueError(f"params must be given, as {why}; and a mapping")
    groups = _groups(found, params, mapping, names)
    if alike:
        decays = {path: bool(found.settings[group].weight_decay) for path, group in groups.items() if group is not None}
        its = max(found.settings, key=lambda its: its.weight_decay)
        return recipe(its, rates[0], map_with_path(lambda path, _: decays[path_name(path)], params))
    transforms = {f"group{n}": recipe(*pair) for n, pair in enumerate(zip(found.settings, rates, strict=True))}
    labels = {path: "frozen" if group is None else f"group{group}" for path, group in groups.items()}
    return partition(transforms | ({"frozen": optax.set_to_zero()} if names else {}), _labelled(labels))


def _alike(found: StateDict, rates: list[Any]) -> bool:
    """Whether all groups are stepped alike, but that some do not decay."""
    kinds = [(its._replace(weight_decay=0.0), rate) for its, rate in zip(found.settings, rates, strict=True)]
    decays = {its.weight_decay for its in found.settings if its.weight_decay}
    steps = {kept.step for kept in found.state.values() if kept.tensors}
    return all(kind == kinds[0] for kind in kinds) and len(decays) <= 1 and len(steps) <= 1


def _groups(found: StateDict, params: Any, mapping: Names | None, frozen: Collection[str]) -> dict[str, int | None]:
    """The number of each parameter's group, by its path; None: it is frozen."""
    every = [place.path for place in places(params, None)]
    still = {name: [path for path in every if path == name or path.startswith(f"{name}.")] for name in frozen}
    for name, paths in still.items():
        if not paths:
            raise ValueError(f"frozen has {name!r}, but params has no such array or subtree, only {some(every)}")
    resting = {path for paths in still.values() for path in paths}
    keys = keys_of(found, places(params, mapping, optional=resting), resting)
    return {path: None if path in resting else found.groups[keys[path]] for path in every}


def _labelled(labels: dict[str, str]) -> Callable[[Any], Any]:
    """The function from the parameters, or a tree like them, to their labels."""

    def label(path: Any, _: Any) -> str:
        if path_name(path) not in labels:
            raise ValueError(f"params must be those that torch_optimizer was given, got {path_name(path)!r}")
        return labels[path_name(path)]

    return lambda tree: map_with_path(label, tree, is_none)


def _rates(param_groups: Any, found: StateDict, lr_lambda: Any) -> list[tuple[float, Any]]:
    """The learning rate of each group, or its base, and by which factor that is multiplied."""
    if lr_lambda is None:
        return [(its.learning_rate, None) for its in found.settings]
    factors = list(lr_lambda) if isinstance(lr_lambda, (list, tuple)) else [lr_lambda] * len(param_groups)
    for factor in factors:
        if not callable(factor):
            raise TypeError(f"lr_lambda must be a function of the step count, or a list of some, got {factor!r:.80}")
    if len(factors) != len(param_groups):
        raise ValueError(f"lr_lambda must have a function for each of {len(param_groups)} groups, got {len(factors)}")
    bases = [
        checked(checks.non_negative, group.get("initial_lr", group["lr"]), f"param_groups[{number}]['initial_lr']")
        for number, group in enumerate(param_groups)
    ]
    return list(zip(bases, factors, strict=True))


def _scheduled(rate: float, factor: Any) -> Any:
    return rate if factor is None else lambda count: rate * factor(count)


def _decoupled(its: Settings, told: bool | None) -> bool:
    told = its.decoupled if told is None else told
    if told is None:
        raise ValueError(
            "decoupled must be True (AdamW) or False (Adam): this state dict, of torch < 2.6, does not say"
        )
    if its.decoupled not in (None, told):
        raise ValueError(f"decoupled must be {its.decoupled}, as the state dict says, got {told}")
    return told
