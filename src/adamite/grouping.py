"""Groups of parameters with transformations of their own: `optax.partition` that says what it is made of.

Optax's own is two functions that hide their groups: neither a checkpoint nor a state dict of torch can be compared.
"""

from collections.abc import Mapping
from typing import Any

import jax
import optax

from adamite import checks
from adamite.core import Optimizer, as_optimizer
from adamite.identity import described
from adamite.paths import unwrapped


@described
def partition(transforms: Mapping[Any, optax.GradientTransformation], param_labels: Any) -> Optimizer:
    """Apply a transformation to each group of parameters: a drop-in for `optax.partition`.

    Checkpoints compare the groups and their arguments, and `adamite.interop` takes them from torch and writes them for
    torch. A function of labels sees the arrays of Flax NNX without their variables, at init and at update.

    Args:
        transforms: the transformation of each label, at least one. `adamite.interop.to_torch` writes the groups in this
            order. ``optax.set_to_zero()`` freezes a group.
        param_labels: the label of each parameter: a tree of labels with the structure of the parameters (or a prefix of
            it), or a function from the parameters to one.

    Returns:
        The transformation. Its state is that of `optax.partition`, an ``optax.PartitionState``.

    Raises:
        ValueError: a label is none of `transforms`.
        TypeError: an argument is the wrong kind of thing.

    Example:
        >>> import jax.numpy as jnp
        >>> from adamite import adamw
        >>> groups = {"body": adamw(1e-4, weight_decay=0.1), "head": adamw(1e-2)}
        >>> tx = partition(groups, {"body": "body", "head": "head"})
        >>> params = {"body": jnp.zeros(1), "head": jnp.zeros(1)}
        >>> updates, state = tx.update({"body": jnp.ones(1), "head": jnp.ones(1)}, tx.init(params), params)
        >>> print(updates["body"].round(5), updates["head"].round(5))
        [-0.0001] [-0.01]
    """
    if not isinstance(transforms, Mapping) or not transforms:
        raise TypeError(f"transforms must be a dict of at least one transformation, got {transforms!r:.80}")
    for label, one in transforms.items():
        checks.transformation(f"transforms[{label!r}]", one)
    for label in () if _is_function(param_labels) else jax.tree.leaves(param_labels):
        if label not in list(transforms):
            raise ValueError(f"param_labels must be of {', '.join(map(repr, transforms))}, got {label!r:.80}")
    return as_optimizer(optax.partition(transforms, lambda params: labels_of(param_labels, params)))


def labels_of(param_labels: Any, params: Any) -> Any:
    """The tree of labels, or a prefix of one, that `partition` is given, for these parameters."""
    return param_labels(unwrapped(params)) if _is_function(param_labels) else unwrapped(param_labels)


def _is_function(param_labels: Any) -> bool:
    """Whether it makes the labels: no tree of labels, which may be callable, too, as the modules of Equinox are."""
    leaves = jax.tree.leaves(param_labels)
    return bool(leaves) and all(map(callable, leaves))
