"""What a torch optimizer does, as a transformation.

    torch's                      a chain of
    Adam                         scale_by_adam,                         scale_by_learning_rate
    Adam with weight_decay       add_decayed_weights,  scale_by_adam,   scale_by_learning_rate
    AdamW                        scale_by_adam,  add_decayed_weights,   scale_by_learning_rate
    amsgrad=True                 scale_by_amsgrad(max_before_correction=True) in place of scale_by_adam

Which weights decay is a mask; in torch it is a second group.
"""

from typing import Any

import optax
from jax.tree_util import tree_map_with_path

from adamite import checks
from adamite.algorithms.adam import scale_by_adam
from adamite.algorithms.amsgrad import scale_by_amsgrad
from adamite.engine import chain
from adamite.interop.names import Names, path_name, places
from adamite.interop.settings import Settings, common
from adamite.interop.state_dicts import StateDict, keys_of, parsed
from adamite.learning_rate import scale_by_learning_rate
from adamite.regularization import add_decayed_weights


def torch_optimizer(
    state_dict: Any,
    params: optax.Params | None = None,
    mapping: Names | None = None,
    *,
    decoupled: bool | None = None,
    moments: Any = "float32",
    rounding: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """The transformation that does what the torch optimizer of this state dict does.

    Args:
        state_dict: of ``torch.optim.Adam`` or ``AdamW``, as `from_torch` takes it. Numbers may be tensors of shape ().
        params: our parameters; needed where one of torch's groups decays and another does not, which becomes a mask.
        mapping: see `from_torch`; it goes with `params`.
        decoupled: whether the decay is AdamW's, or L2 in the gradient, for torch < 2.6, whose state dicts do not say.
        moments: how they are kept, see `adamite.scale_by_adam`.
        rounding: of weights of 16 bits, see `adamite.round_weights`.

    Returns:
        The transformation, an `adamite.chain`. Its learning rate is the number that torch has now: a schedule of
        torch's is no part of an optimizer.

    Raises:
        RefusedError: the state dict is damaged or foreign; it maximizes; its groups differ in more than whether they
            decay.
        ValueError: `decoupled` is missing, or contradicts the state dict; `params` is missing.
        TypeError: an argument is the wrong kind of thing.

    Example:
        >>> import jax.numpy as jnp
        >>> group = {"params": [0], "lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.5,
        ...          "amsgrad": False, "decoupled_weight_decay": True}
        >>> tx, params = torch_optimizer({"state": {}, "param_groups": [group]}), jnp.array([2.0])
        >>> print(tx.update(jnp.zeros(1), tx.init(params), params)[0])
        [-0.1]
    """
    decoupled = None if decoupled is None else checks.flag("decoupled", decoupled)
    found = parsed(state_dict)
    its = common(found.settings)
    if its.amsgrad:
        direction = scale_by_amsgrad(its.b1, its.b2, its.eps, max_before_correction=True, moments=moments)
    else:
        direction = scale_by_adam(its.b1, its.b2, its.eps, moments=moments)
    parts = [direction, scale_by_learning_rate(its.learning_rate)]
    if its.weight_decay:
        decay = add_decayed_weights(its.weight_decay, _mask(found, params, mapping))
        parts.insert(1 if _decoupled(its, decoupled) else 0, decay)
    return chain(*parts, rounding=rounding)


def _decoupled(its: Settings, told: bool | None) -> bool:
    told = its.decoupled if told is None else told
    if told is None:
        raise ValueError(
            "decoupled must be True (AdamW) or False (Adam): this state dict, of torch < 2.6, does not say"
        )
    if its.decoupled not in (None, told):
        raise ValueError(f"decoupled must be {its.decoupled}, as the state dict says, got {told}")
    return told


def _mask(found: StateDict, params: Any, mapping: Names | None) -> Any:
    """Which parameters decay: None for all."""
    if all(one.weight_decay for one in found.settings):
        return None
    if params is None:
        raise ValueError("params must be given, as one of torch's groups decays and another does not; and a mapping")
    keys = keys_of(found, places(params, mapping))
    decays = {path: bool(found.settings[found.groups[key]].weight_decay) for path, key in keys.items()}
    return tree_map_with_path(lambda path, _: decays[path_name(path)], params)
