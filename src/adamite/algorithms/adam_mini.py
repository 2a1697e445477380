"""Adam-mini: Adam with one second moment for a whole block of weights, and so half of its memory.

At step t = 1, 2, ... with gradient g:

    c1, c2 = 1 - b1^t, 1 - b2^t
    m      <- (1 - b1) g + b1 m
    v      <- (1 - b2) mean(|g|^2) + b2 v           mean over each block
    u      = (m / c1) / (sqrt(v / c2) + eps)

A block should hold weights whose curvatures are alike: those of an output neuron, of an attention head, of a token. The
state's ``nu`` has length 1 along the axes that its blocks extend over.

Zhang et al. 2024, arXiv:2406.16793, Algorithm 1; the partition is that of its Transformers, see `adam_mini_partition`.

Deviation: the authors' program keeps Adam's second moment for biases; here a bias is one block, like a norm.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import KeyPath, keystr

from adamite import checks
from adamite.core import Optimizer, Rule, chain, from_rule
from adamite.identity import described
from adamite.learning_rate import scale_by_learning_rate
from adamite.numerics import abs_sq, total_weight, update_moment
from adamite.regularization import add_decayed_weights
from adamite.storage import Dense, PerBlock

Partition = Callable[[KeyPath, Any], tuple[int, ...]]


def adam_mini_rule(*, b1: jax.typing.ArrayLike, b2: jax.typing.ArrayLike, eps: jax.typing.ArrayLike) -> Rule:
    """The equations above."""

    def scalars(t: jax.Array) -> tuple[Any, Any]:
        return total_weight(b1, t), total_weight(b2, t)

    def step(scalars: tuple[Any, Any], g: Any, m: Any, v: Any) -> tuple[Any, Any, Any]:
        c1, c2 = scalars
        m = update_moment(g, m, b1, order=1)
        v = update_moment(_mean(abs_sq(g), v.shape), v, b2, order=1)
        u = (m / c1) / (jnp.sqrt(v / c2) + eps)
        return u, m, v

    return Rule(scalars, step, elementwise=False)


def adam_mini_partition(path: KeyPath, leaf: Any) -> tuple[int, ...]:
    """The axes that the blocks of a leaf extend over, from its name and shape.

    - A bias or a norm, that is a leaf below two axes or named ``bias`` or ``scale``: one block, all axes.
    - ``embedding`` and the like, (tokens, features): a block for each token, the last axis.
    - ``kernel`` of ``query`` or ``key``, (inputs, heads, features): a block for each head, all but the last but one.
    - ``kernel`` of ``value``, (inputs, heads, features): a block for each output neuron, all axes but the last two.
    - ``weight`` (Equinox, PyTorch), embeddings' too, (outputs, ...): each output neuron, all axes but the first.
    - Any other, dense, convolution, attention's output, (..., outputs): each output neuron, all axes but the last.

    A query of shape (inputs, heads * features) does not tell its heads; it gets a block for each output neuron, which
    is finer. Leaves that stack several layers along a first axis need a partition of your own.

    Args:
        path: the leaf's, as `jax.tree_util` gives it, without Flax's ``.value`` (see `adamite.map_with_path`).
        leaf: anything with a ``shape``.

    Example:
        >>> from jax.tree_util import DictKey
        >>> adam_mini_partition((DictKey("query"), DictKey("kernel")), jnp.zeros((512, 8, 64)))
        (0, 2)
    """
    names = keystr(path, simple=True, separator="/").lower().split("/")
    own, ndim = names[-1], len(leaf.shape)
    if ndim < 2 or own in ("bias", "scale"):
        kept = ()
    elif any(name in own for name in ("embed", "embd", "wte", "wpe")):
        kept = tuple(range(ndim - 1))
    elif ndim == 3 and own == "kernel" and _QUERY_OR_KEY.intersection(names):
        kept = (ndim - 2,)
    elif ndim == 3 and own == "kernel" and _VALUE.intersection(names):
        kept = (ndim - 2, ndim - 1)
    else:
        kept = (0,) if own == "weight" else (ndim - 1,)
    return tuple(axis for axis in range(ndim) if axis not in kept)


@described
def scale_by_adam_mini(
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    mu_dtype: jax.typing.DTypeLike | None = None,
    *,
    partition: Partition | None = None,
    moments: Any = "float32",
) -> Optimizer:
    """Adam-mini's direction, not yet scaled by a learning rate nor negated.

    Args:
        b1: see `adamite.scale_by_adam`, as for the three that follow.
        b2: see `adamite.scale_by_adam`.
        eps: see `adamite.scale_by_adam`.
        mu_dtype: see `adamite.scale_by_adam`.
        partition: a function that gives the axes of a leaf to average over, from its path and the leaf; called by init
            alone. None: `adam_mini_partition`.
        moments: see `adamite.scale_by_adam`.

    Returns:
        The transformation. Its state has the class of that of `adamite.scale_by_adam`; ``nu`` is smaller.

    Raises:
        ValueError: an argument is out of its range; at init, a partition names axes that a leaf has not; at update,
            trees differ in structure or shape (with the path).
        TypeError: an argument or a leaf is the wrong kind of thing; the state is another optimizer's.

    Example:
        Three inputs, two neurons. Adam would move every weight by 1; here that is a neuron's root mean square:

        >>> tx, g = scale_by_adam_mini(), {"kernel": jnp.array([[1.0, 0.0], [1.0, 0.0], [1.0, 3.0]])}
        >>> direction, state = tx.update(g, tx.init(g))
        >>> print(state.nu["kernel"].shape)
        (1, 2)
        >>> print(direction["kernel"].round(2))
        [[1.   0.  ]
         [1.   0.  ]
         [1.   1.73]]
    """
    b1, b2 = checks.decay_rate("b1", b1), checks.decay_rate("b2", b2)
    eps, mu_dtype = checks.non_negative("eps", eps), checks.floating_dtype("mu_dtype", mu_dtype)
    partition = adam_mini_partition if partition is None else checks.function("partition", partition)

    rule = adam_mini_rule(b1=b1, b2=b2, eps=eps)
    return from_rule(rule, optax.ScaleByAdamState, {"mu": Dense(mu_dtype), "nu": PerBlock(partition)}, moments)


@described
def adam_mini(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    mu_dtype: jax.typing.DTypeLike | None = None,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any = None,
    *,
    partition: Partition | None = None,
    moments: Any = "float32",
    rounding: Any = None,
) -> Optimizer:
    """Adam-mini, with decoupled weight decay if asked for.

    Arguments, state and errors are those of `adamite.adamw` and `scale_by_adam_mini`; its update needs `params`.

    Example:
        >>> params = {"embedding": jnp.zeros((1000, 64))}
        >>> tx = adam_mini(1e-3, partition=lambda path, leaf: (0, 1))
        >>> tx.init(params)[0].nu["embedding"].shape
        (1, 1)
    """
    return chain(
        scale_by_adam_mini(b1, b2, eps, mu_dtype, partition=partition, moments=moments),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
        rounding=rounding,
    )


_QUERY_OR_KEY = frozenset({"query", "key", "q", "k", "q_proj", "k_proj", "wq", "wk"})
_VALUE = frozenset({"value", "v", "v_proj", "wv"})


def _mean(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """`x` averaged over the axes along which `shape` has length 1."""
    axes = tuple(axis for axis, n in enumerate(shape) if n == 1)
    return jnp.sum(x, axes, keepdims=True) / max(1, math.prod(x.shape[axis] for axis in axes))
