"""`optax.partition` that says what it is made of.

Optax's own is two functions that hide their groups: then settings cannot be compared, nor written for torch.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import optax

from adamite import checks
from adamite.engine import Optimizer, as_optimizer
from adamite.identity import identity


def partition(transforms: Mapping[Any, optax.GradientTransformation], param_labels: Any) -> Optimizer:
    """Apply a transformation to each group of parameters: `optax.partition`, of which `from_torch` knows the groups.

    Args:
        transforms: the transformation of each label, at least one. `to_torch` writes the groups in this order.
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
    labels = jax.tree.leaves(param_labels)
    function = param_labels
    if not labels or not all(map(callable, labels)):
        for label in labels:
            if label not in list(transforms):
                raise ValueError(f"param_labels must be of {', '.join(map(repr, transforms))}, got {label!r:.80}")
        function = lambda _: param_labels  # noqa: E731 (optax would call a tree that can be called, as Equinox' are)
    tx = as_optimizer(optax.partition(transforms, function))
    # No dict: telemetry would take the learning rate of the first group for that of all.
    told = MappingProxyType({label: identity(one) for label, one in transforms.items()})
    tx.__dict__["identity"] = {"name": partition.__name__, "transforms": told, "param_labels": function}
    return tx
