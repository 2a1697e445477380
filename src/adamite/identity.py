"""What a transformation is: the name of the function that built it, and its arguments.

A transformation of Optax is two functions, and what they close over cannot be seen. Ours carry it, so that a checkpoint
can say whose it is and telemetry knows the learning rate:

    {"name": "adamw", "learning_rate": 0.001, "b1": 0.9, ...}

Arguments that are transformations stand there as what they are. Of a transformation that is not ours, only the function
that built it is known:

    {"name": "optax.clip_by_global_norm"}
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

import optax

LOST = "lost: built anew from the functions of an optimizer of adamite"
"""The name of what does not know its name any more."""

Args = ParamSpec("Args")
Tx = TypeVar("Tx", bound=optax.GradientTransformationExtraArgs)


def described(build: Callable[Args, Tx]) -> Callable[Args, Tx]:
    """`build`, a function that makes a transformation, such that `identity` knows what it has made."""
    signature = inspect.signature(build)

    @functools.wraps(build)
    def built(*args: Args.args, **kwargs: Args.kwargs) -> Tx:
        tx = build(*args, **kwargs)
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return describe(tx, build.__name__, bound.arguments)

    return built


def describe(tx: Tx, name: str, arguments: Mapping[str, Any]) -> Tx:
    """`tx`, of which `identity` says that the function `name` built it from these arguments."""
    tx.__dict__["identity"] = {"name": name, **{k: _plain(v) for k, v in arguments.items()}}
    return tx


def identity(tx: Any) -> dict[str, Any]:
    """What a transformation is: the name of the function that built it and, of one of adamite's, its arguments.

    Where the functions `init` and `update` of an optimizer of adamite were taken out of it, its arguments are lost, and
    the name says so. `adamite.checkpoint` refuses such a transformation.

    Example:
        >>> from adamite import adam
        >>> of_adam = identity(adam(1e-3))
        >>> of_adam["name"], of_adam["learning_rate"], of_adam["b2"]
        ('adam', 0.001, 0.999)
        >>> identity(optax.clip_by_global_norm(1.0))
        {'name': 'optax.clip_by_global_norm'}
    """
    told = getattr(tx, "identity", None)
    if told is not None:
        return dict(told)
    function = getattr(tx, "update", tx)
    while isinstance(function, functools.partial):
        function = function.func
    room, _, _ = str(getattr(function, "__module__", type(tx).__module__)).partition(".")
    name, _, _ = str(getattr(function, "__qualname__", type(tx).__qualname__)).partition(".<locals>")
    if room == __name__.partition(".")[0]:
        return {"name": LOST}
    return {"name": f"{room}.{name}"}


def _plain(value: Any) -> Any:
    if isinstance(value, optax.GradientTransformation):
        return identity(value)
    if isinstance(value, tuple):
        return tuple(map(_plain, value))
    if isinstance(value, Mapping) and any(isinstance(x, optax.GradientTransformation) for x in value.values()):
        return {label: _plain(x) for label, x in value.items()}
    return value
