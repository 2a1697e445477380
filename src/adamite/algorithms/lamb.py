"""LAMB: Adam whose step in each leaf is as long, relative to the leaf's norm, as the learning rate says.

At step t = 1, 2, ... with gradient g, for each leaf p:

    r = adam's direction + weight_decay p
    u = trust_coefficient max(|p|, min_norm) / (max(|r|, min_norm) + eps) r      r where either norm is 0

|.| is the Euclidean norm over the whole leaf. The parameters then move by -learning_rate u.

You et al. 2019, arXiv:1904.00962, Algorithm 2, in which a layer is a leaf here and its phi is the identity.

Deviations from the paper, all of them optax's too:

1. Where the norm of p or of r is 0 the ratio is 1: parameters that start at 0 would never move.
2. trust_coefficient, min_norm and the ratio's eps are not in the paper; they do nothing unless asked for.
"""

from typing import Any

import jax
import optax

from adamite import checks
from adamite.algorithms.adam import scale_by_adam
from adamite.engine import chain, uphold
from adamite.engine.matching import counterparts
from adamite.learning_rate import scale_by_learning_rate
from adamite.numerics import is_none, widen
from adamite.regularization import add_decayed_weights


def scale_by_trust_ratio(
    min_norm: jax.typing.ArrayLike = 0.0,
    trust_coefficient: jax.typing.ArrayLike = 1.0,
    eps: jax.typing.ArrayLike = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """Give each leaf's update the norm of the leaf: optax's, in float32, its arguments checked.

    Args:
        min_norm: finite, >= 0: the least that either norm counts for.
        trust_coefficient: finite, >= 0: what the ratio is multiplied by.
        eps: finite, >= 0: added to the update's norm.

    Returns:
        The transformation. Its state is ``optax.EmptyState``. Its update needs `params`.

    Raises:
        ValueError: an argument is out of its range; at update, `params` is missing or differs in structure or shape.
        TypeError: an argument is the wrong kind of thing.

    Example:
        >>> import jax.numpy as jnp
        >>> tx, params = scale_by_trust_ratio(), jnp.array([3.0, 4.0])
        >>> updates, _ = tx.update(jnp.array([1.0, 0.0]), tx.init(params), params)
        >>> print(updates)
        [5. 0.]
    """
    inner = optax.scale_by_trust_ratio(
        checks.non_negative("min_norm", min_norm),
        checks.non_negative("trust_coefficient", trust_coefficient),
        checks.non_negative("eps", eps),
    )

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        if params is None:
            raise ValueError("the trust ratio needs the parameters: call update(updates, state, params)")
        counterparts(updates, params, "params")
        wide = jax.tree.map(lambda g, p: None if g is None else widen(p), updates, params, is_leaf=is_none)
        return inner.update(updates, state, wide)

    return uphold(optax.GradientTransformation(inner.init, update))


def lamb(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-6,
    eps_root: jax.typing.ArrayLike = 0.0,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any = None,
    *,
    moments: Any = "float32",
    rounding: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """LAMB: a drop-in for ``optax.lamb``.

    Args:
        learning_rate: finite and >= 0, the share of a leaf's norm that a step moves it by; or a schedule.
        b1: see `adamite.scale_by_adam`, as for the three that follow.
        b2: see `adamite.scale_by_adam`.
        eps: see `adamite.scale_by_adam`.
        eps_root: see `adamite.scale_by_adam`.
        weight_decay: see `adamite.add_decayed_weights`; the decay is inside the norm.
        mask: see `adamite.add_decayed_weights`. Every leaf gets its ratio.
        moments: see `adamite.scale_by_adam`.
        rounding: see `adamite.adam`.

    Returns:
        The optimizer; its update needs `params`. Its state is a tuple: that of `adamite.scale_by_adam`, of
        `adamite.add_decayed_weights`, of `scale_by_trust_ratio` and of `adamite.scale_by_learning_rate`.

    Raises:
        ValueError: an argument is out of its range; at update, `params` is missing.
        TypeError: an argument is the wrong kind of thing.

    Example:
        A step of 0.1 moves each leaf by a tenth of its norm, whatever the gradients are:

        >>> import jax.numpy as jnp
        >>> tx, params = lamb(0.1), {"a": jnp.array([3.0, 4.0]), "b": jnp.array([30.0, 40.0])}
        >>> updates, _ = tx.update({"a": jnp.array([7.0, 0.0]), "b": jnp.array([0.0, -0.1])}, tx.init(params), params)
        >>> print(updates["a"].round(3), updates["b"].round(3))
        [-0.5 -0. ] [-0.  5.]
    """
    return chain(
        scale_by_adam(b1, b2, eps, eps_root, moments=moments),
        add_decayed_weights(weight_decay, mask),
        scale_by_trust_ratio(),
        scale_by_learning_rate(learning_rate),
        rounding=rounding,
    )
