"""Which engine takes which leaf, and why.

    xla       XLA, which fuses what it can: update, then the sum. It takes every leaf.
    pallas    a kernel for TPUs. On CPUs it is interpreted, which only tests want.
    native    a library for CPUs, the distribution adamite-native.
    auto      on a CPU native, where it is installed; on a TPU pallas, where it moves fewer bytes than XLA; else xla.

What an engine cannot take falls to xla, and is told: `adamite.memory_report` lists every leaf.
"""

import contextlib
import contextvars
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import AxisType

from adamite.engines import sharded
from adamite.engines.leaf_step import Fused, Leaf, split
from adamite.engines.library import library
from adamite.numerics import is_traced
from adamite.random_bits import element_index

ENGINES = ("auto", "xla", "pallas", "native")


class Choice(NamedTuple):
    """What was chosen for a leaf."""

    number: int
    engine: str
    why: str
    """Why it is XLA; "" where it is a kernel."""


_record: contextvars.ContextVar[list[Choice] | None] = contextvars.ContextVar("adamite_choices", default=None)


@contextlib.contextmanager
def recorded() -> Iterator[list[Choice]]:
    """Collects what is chosen while steps are traced inside."""
    choices: list[Choice] = []
    token = _record.set(choices)
    try:
        yield choices
    finally:
        _record.reset(token)


def unwanted(engine: str) -> str:
    """Why no kernel is asked for, on this machine; "" if one is."""
    if _asked(engine) != "xla":
        return ""
    if engine == "xla":
        return "it was asked for"
    return "adamite-native is not installed" if jax.default_backend() == "cpu" else "no kernel is for this platform"


def choose(engine: str, fused: Fused, scalars: Any, leaf: Leaf, elementwise: bool) -> str:
    """The engine that takes a leaf: "xla", or another that was asked for and can."""
    asked, why = _asked(engine), unwanted(engine)
    if asked != "xla":
        why = _elsewhere(asked, fused, leaf) if elementwise else "its step needs the whole leaf"
    if not why:
        why = _unserved(asked, fused, scalars, leaf)
    if engine == "auto" and asked == "pallas" and not why:
        plain = fused.block == 1 or leaf.p.ndim < 2 or leaf.p.shape[-1] % 128
        why = "XLA moves as few bytes" if plain else ""
    name = "xla" if why else asked
    choices = _record.get()
    if choices is not None:
        choices.append(Choice(leaf.number, name, why))
    return name


def take(name: str, fused: Fused, scalars: Any, leaves: Sequence[Leaf]) -> list[tuple[jax.Array, Any]]:
    """One step of several leaves by an engine that can take them. Its derivatives are those of XLA's step."""
    numbers, put = split(scalars)

    @jax.custom_jvp
    def step(numbers: Any, arrays: Any) -> list[tuple[jax.Array, Any]]:
        its = [leaf._replace(g=g, p=p, stored=stored) for leaf, (g, p, stored) in zip(leaves, arrays, strict=True)]
        return _taken(name, fused, put(numbers), its)

    @step.defjvp
    def _derivative(primals: Any, tangents: Any) -> Any:
        def plainly(numbers: Any, arrays: Any) -> list[tuple[jax.Array, Any]]:
            indices = [functools.partial(element_index, leaf.p.shape) for leaf in leaves]
            return [
                fused.step(put(numbers), leaf.number, index, *of, leaf.dtype)
                for leaf, index, of in zip(leaves, indices, arrays, strict=True)
            ]

        return jax.jvp(plainly, primals, tangents)

    return step(numbers, [(leaf.g, leaf.p, leaf.stored) for leaf in leaves])


def _taken(name: str, fused: Fused, scalars: Any, leaves: Sequence[Leaf]) -> list[tuple[jax.Array, Any]]:
    if name == "native":
        return _native().run(fused, scalars, leaves)
    spread = [leaf for leaf in leaves if sharded.sharding_of(leaf.p)]
    here = [leaf for leaf in leaves if not sharded.sharding_of(leaf.p)]
    done = {leaf.number: sharded.run(_by_pallas, fused, scalars, leaf) for leaf in spread}
    if here:
        done |= zip([leaf.number for leaf in here], _by_pallas(fused, scalars, here), strict=True)
    return [done[leaf.number] for leaf in leaves]


def _by_pallas(fused: Fused, scalars: Any, leaves: Sequence[Leaf]) -> list[tuple[jax.Array, Any]]:
    """A program that is traced on a CPU may be compiled there for a TPU."""
    return jax.lax.platform_dependent(
        tpu=lambda: _pallas().run(fused, scalars, leaves),
        default=lambda: _pallas().run(fused, scalars, leaves, interpret=True),
    )


def _asked(engine: str) -> str:
    """What is asked for, on this machine."""
    if engine != "auto":
        return engine
    platform = jax.default_backend()
    return "pallas" if platform == "tpu" else "native" if platform == "cpu" and library() else "xla"


def _native() -> Any:
    from adamite.engines import native

    return native


def _pallas() -> Any:
    """Imported where it is wanted, for others should not wait for Pallas."""
    from adamite.engines import pallas

    return pallas


def _unserved(asked: str, fused: Fused, scalars: Any, leaf: Leaf) -> str:
    """Why the engine that is asked for has no kernel for the leaf; "" if it has."""
    if asked == "native":
        return _native().why_not(fused, scalars, leaf)
    return _pallas().why_not(fused, leaf)


def _elsewhere(asked: str, fused: Fused, leaf: Leaf) -> str:
    """Why a kernel cannot have the leaf where it is; "" if it can."""
    platform = jax.default_backend()
    if asked == "pallas" and platform == "gpu":
        return "Pallas kernels are for TPUs"
    if asked == "native" and platform != "cpu":
        return "native kernels are for CPUs"
    if sharded.sharding_of(leaf.p):
        return "it is on several devices" if asked == "native" else sharded.why_not(fused, leaf)
    for x in jax.tree.leaves((leaf.g, leaf.p, leaf.stored)):
        if not is_traced(x):
            if isinstance(x, jax.Array) and len(x.sharding.device_set) > 1:
                return "it is on several devices"
        elif jax.device_count() > 1 and not _known(jax.typeof(x).sharding.mesh):
            return "jit does not show on which of several devices it is: use Explicit axes, explicit_axes or shard_map"
    return ""


def _known(mesh: Any) -> bool:
    """Whether an array on this mesh, as far as its type shows it, is certainly on one device."""
    return AxisType.Manual in mesh.axis_types or (bool(mesh.shape) and math.prod(mesh.shape.values()) == 1)
