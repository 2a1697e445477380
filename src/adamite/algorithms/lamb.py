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
import jax.numpy as jnp
import optax

from adamite import checks
from adamite.algorithms.adam import scale_by_adam
from adamite.core import Optimizer, chain, uphold
from adamite.core.matching import counterparts
from adamite.identity import described
from adamite.learning_rate import scale_by_learning_rate
from adamite.numerics import abs_sq, is_none, over_devices, widen
from adamite.regularization import add_decayed_weights


@described
def scale_by_trust_ratio(
    min_norm: jax.typing.ArrayLike = 0.0,
    trust_coefficient: jax.typing.ArrayLike = 1.0,
    eps: jax.typing.ArrayLike = 0.0,
    *,
    axis_name: str | tuple[str, ...] | None = None,
) -> Optimizer:
    """Give each leaf's update the norm of the leaf: optax's, in float32, its arguments checked.

    Args:
        min_norm: finite, >= 0: the least that either norm counts for.
        trust_coefficient: finite, >= 0: what the ratio is multiplied by.
        eps: finite, >= 0: added to the update's norm.
        axis_name: inside of shard_map or pmap, the axes of the mesh that cut leaves; without it, a device sees its own
            part only. Leaves that they do not cut are recognized, unless by pmap or ``check_vma=False``. Under jit
            arrays are whole, and nothing is needed.

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
    least, axes = checks.non_negative("min_norm", min_norm), checks.axis_name(axis_name)
    coefficient, eps = checks.non_negative("trust_coefficient", trust_coefficient), checks.non_negative("eps", eps)

    def norm(x: jax.Array) -> jax.Array:
        squares = over_devices(jnp.sum(abs_sq(x)), x, axes)
        short = jnp.sqrt(squares) <= least
        return jnp.where(short, least, jnp.sqrt(jnp.where(short, 1, squares)))  # the root of 0 has no derivative

    def scaled(r: jax.Array | None, p: Any) -> jax.Array | None:
        if r is None:
            return None
        of_p, of_r = norm(widen(p)), norm(r)
        return r * jnp.where((of_p == 0) | (of_r == 0), 1, coefficient * of_p / (of_r + eps))

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        if params is None:
            raise ValueError("the trust ratio needs the parameters: call update(updates, state, params)")
        counterparts(updates, params, "params")
        return jax.tree.map(scaled, updates, params, is_leaf=is_none), state

    return uphold(optax.GradientTransformation(optax.init_empty_state, update))


@described
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
    axis_name: str | tuple[str, ...] | None = None,
) -> Optimizer:
    """LAMB: a drop-in for ``optax.lamb``.

    Arguments and errors are those of `adamite.adamw`; `axis_name` is that of `scale_by_trust_ratio`. `learning_rate` is
    the share of a leaf's norm that a step moves it by, weight decay is inside the norm, and every leaf gets its ratio,
    whatever `mask` says of its decay.

    Returns:
        The optimizer; its update needs `params`. Its state is a tuple: that of `adamite.scale_by_adam`, of
        `adamite.add_decayed_weights`, of `scale_by_trust_ratio` and of `adamite.scale_by_learning_rate`.

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
        scale_by_trust_ratio(axis_name=axis_name),
        scale_by_learning_rate(learning_rate),
        rounding=rounding,
    )
