"""Steps of leaves by the compiled kernels of adamite-native, on CPUs.

One custom call steps a group of leaves, in place where XLA lets it. Groups are small, because the time that XLA takes
for the aliases of one call grows with the square of their number.
"""

import functools
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adamite.engines.leaf_step import Leaf, LeafStep, unserved
from adamite.engines.native.calls import Arrays
from adamite.engines.native.library import library
from adamite.engines.native.program import Program, UnsupportedError
from adamite.engines.native.rows import axes_of
from adamite.engines.native.tracing import program

GROUP = 64
"""Leaves of one call, at most."""

TARGET = "adamite_step"

SPARE = 1024
"""Operands that no kernel reads. XLA runs a program of less than 1,000 operations, and a custom call is none, on the
thread of its caller, who then has to wait; to number these is enough of them."""

REINSTALL = "To build it anew: pip install --force-reinstall --no-cache-dir adamite-native"

DTYPES = tuple(map(jnp.dtype, (jnp.float32, jnp.bfloat16, jnp.int8, jnp.uint8, jnp.int16)))


def why_not(step: LeafStep, scalars: Any, leaf: Leaf) -> str:
    """Why no kernel steps this leaf, in words; empty if one does."""
    if library() is None:
        return "adamite-native is not installed"
    if reason := unserved(step, leaf, DTYPES):
        return reason
    if reason := _refused():
        return reason
    try:
        its = program(step, scalars, leaf)
    except UnsupportedError as error:
        return str(error)
    found: Any = library()
    if its.name in found.kernels():
        return ""
    _warn_if_missing(its.name, (leaf.g if leaf.p is None else leaf.p).dtype.name, leaf.g.dtype.name)
    return "no kernel of adamite-native does this step"


def run(step: LeafStep, scalars: Any, leaves: Sequence[Leaf]) -> list[tuple[jax.Array, Any]]:
    """The result of each leaf and what the state then holds; `why_not` must have said nothing for any of them."""
    programs = [program(step, scalars, leaf) for leaf in leaves]
    operands = {name: _operands(own, scalars) for name, own in {id(own): own for own in programs}.items()}
    results: list[tuple[jax.Array, Any]] = []
    for group in _batches(leaves, programs):
        results += _call(step, group, operands)
    return results


def _batches(leaves: Sequence[Leaf], programs: Sequence[Program]) -> list[list[tuple[Leaf, Program]]]:
    pairs = list(zip(leaves, programs, strict=True))
    return [pairs[start : start + GROUP] for start in range(0, len(pairs), GROUP)]


def _call(
    step: LeafStep, group: list[tuple[Leaf, Program]], operands: dict[int, jax.Array]
) -> list[tuple[jax.Array, Any]]:
    kinds = list({id(its): its for _, its in group}.values())
    origins = [jnp.uint32(0) if leaf.place is None else leaf.place.origin for leaf, _ in group]
    arrays = Arrays(step, jnp.stack(origins), *(operands[id(its)] for its in kinds))
    for leaf, its in group:
        arrays.add(leaf, its)
    call = jax.ffi.ffi_call(TARGET, arrays.shapes, input_output_aliases=arrays.aliases, vmap_method="sequential")
    rows = [axes_of(leaf) for leaf, _ in group]
    results = call(
        *arrays.arguments,
        kernels=",".join(its.name for its in kinds),
        kernel=np.array([[id(x) for x in kinds].index(id(its)) for _, its in group]),
        number=np.array([leaf.number for leaf, _ in group]),
        columns=np.array([leaf.g.shape[-1] if leaf.g.ndim else 1 for leaf, _ in group]),
        axes=np.array([len(axes) for axes in rows]),
        lengths=np.array([length for axes in rows for length, _ in axes], np.int64),
        strides=np.array([stride for axes in rows for _, stride in axes], np.int64),
    )
    return arrays.stepped(results)


def _operands(its: Program, scalars: Any) -> jax.Array:
    """The operands, and the spare ones."""
    spare = jax.lax.iota(jnp.uint32, SPARE) ^ jax.lax.optimization_barrier(jnp.uint32(0))  # else it were a constant
    return jnp.concatenate([*(x[None] for x in its.operands(scalars)), spare])


@functools.cache
def _refused() -> str:
    """Why JAX does not take the library; "" if it has taken it. A library may be older than JAX, but not newer."""
    found: Any = library()
    try:
        jax.ffi.register_ffi_target(TARGET, found.handler(), platform="cpu")
    except jax.errors.JaxRuntimeError:
        built, here = found.built_with(), found.versions()
        reason = f"adamite-native was built with jax {built['jax']}, which is too new for jax {here['jax']}"
        warnings.warn(f"{reason}: XLA takes its steps. {REINSTALL}", stacklevel=2)
        return reason
    return ""


@functools.cache
def _warn_if_missing(name: str, weights: str, gradients: str) -> None:
    """Warn once of a kernel that the library would have, had it been generated with the versions that are here."""
    found: Any = library()
    built, here = found.built_with(), found.versions()
    if built == here:
        return
    if step := found.step_of(name, weights, gradients):
        theirs, ours = (" and ".join(f"{k} {v}" for k, v in versions.items()) for versions in (built, here))
        warnings.warn(
            f"adamite-native has no kernel for this step ({step}): it was built with {theirs}, and here are {ours}. "
            f"XLA takes the step. {REINSTALL}",
            stacklevel=2,
        )
