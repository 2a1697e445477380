"""Functions that are traced when they are lowered: only then is it known what they are compiled for.

A step compiled on a CPU may be for a TPU, and for any number of devices. `jax.lax.platform_dependent` traces what each
platform would do. A deferred function costs nothing where it is not lowered, and is told what for.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir


class Target(NamedTuple):
    """What a function is lowered for."""

    devices: int = 1
    """Over how many devices XLA's partitioner will spread its arrays afterwards."""
    platforms: int = 1
    """For how many platforms the program is: `jax.export` may be asked for several."""


Deferred = Callable[..., Sequence[jax.Array]]
"""``function(target, *arrays) -> arrays``."""

_deferred = Primitive("adamite_deferred")
_deferred.multiple_results = True


def deferred(function: Deferred, results: Sequence[Any], *arrays: jax.Array) -> list[jax.Array]:
    """``function(target, *arrays)``, traced when it is lowered.

    Args:
        function: it may depend on the `Target`.
        results: the types of its results, as `jax.typeof` gives them.
        *arrays: its arguments. If they are no tracers, it is called at once.
    """
    return _deferred.bind(*arrays, function=function, results=tuple(results))


@_deferred.def_abstract_eval
def _types(*arrays: Any, function: Deferred, results: tuple[Any, ...]) -> Any:
    del arrays, function
    return results


@_deferred.def_impl
def _at_once(*arrays: Any, function: Deferred, results: tuple[Any, ...]) -> Any:
    del results
    return function(Target(), *arrays)


def _lower(context: Any, *values: Any, function: Deferred, results: tuple[Any, ...]) -> Any:
    del results
    module = context.module_context
    own = functools.partial(function, Target(_devices(module.axis_context), len(module.platforms)))
    return mlir.lower_fun(own, multiple_results=True)(context, *values)


def _devices(axes: Any) -> int:
    """Over how many devices XLA's partitioner spreads what is lowered: along axes that are not manual."""
    mesh = getattr(axes, "mesh", None)
    if mesh is not None:
        return math.prod(size for name, size in mesh.shape.items() if name not in axes.manual_axes)
    return getattr(axes, "num_devices", None) or 1


def _batch(arrays: Sequence[Any], axes: Sequence[Any], *, function: Deferred, results: tuple[Any, ...]) -> Any:
    del results

    def batched(target: Target, *arrays: Any) -> Any:
        return jax.vmap(functools.partial(function, target), tuple(axes))(*arrays)

    types = jax.make_jaxpr(functools.partial(batched, Target()))(*arrays).out_avals
    return _deferred.bind(*arrays, function=batched, results=tuple(types)), (0,) * len(types)


mlir.register_lowering(_deferred, _lower)
batching.primitive_batchers[_deferred] = _batch
