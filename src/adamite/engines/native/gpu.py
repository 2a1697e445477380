"""Steps of leaves on NVIDIA's GPUs, by kernels that are printed when a step is traced and compiled when it first runs.

One custom call steps a group of leaves of one program by one kernel. NVRTC, which JAX' CUDA wheels bring, compiles the
text inside of the call, once for each GPU (`native/cpp/gpu.cc`). Settings are operands: another learning rate compiles
nothing. Groups are not larger, because the time that XLA takes for the aliases of one call grows with the square of
their number.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adamite.engines.leaf_step import Leaf, LeafStep, unserved
from adamite.engines.native import cuda
from adamite.engines.native.calls import Arrays
from adamite.engines.native.cuda_expressions import SIZES
from adamite.engines.native.library import library
from adamite.engines.native.program import BLOCK, Program, UnsupportedError
from adamite.engines.native.rows import rows_of
from adamite.engines.native.tracing import program

GROUP = 128
"""Leaves of one call, at most."""

TARGET = "adamite_gpu_step"

DTYPES = tuple(map(jnp.dtype, SIZES))


def why_not(step: LeafStep, scalars: Any, leaf: Leaf) -> str:
    """Why no kernel steps this leaf, in words; empty if one does."""
    if reason := unserved(step, leaf, DTYPES) or _refused():
        return reason
    try:
        its = _program(step, scalars, leaf)
        cuda.source(its)
    except UnsupportedError as error:
        return str(error)
    own = rows_of(its, leaf)
    return "it has 2^31 blocks or more" if own.rows * math.ceil(own.columns / BLOCK) >= 2**31 else ""


def run(step: LeafStep, scalars: Any, leaves: Sequence[Leaf]) -> list[tuple[jax.Array, Any]]:
    """The result of each leaf and what the state then holds; `why_not` must have said nothing for any of them."""
    programs = [_program(step, scalars, leaf) for leaf in leaves]
    results: dict[int, tuple[jax.Array, Any]] = {}
    for its in {own.name: own for own in programs}.values():
        operands = its.operands(scalars)
        own = [i for i, other in enumerate(programs) if other.name == its.name]
        for start in range(0, len(own), GROUP):
            group = own[start : start + GROUP]
            results |= zip(group, _call(step, its, operands, [leaves[i] for i in group]), strict=True)
    return [results[i] for i in range(len(leaves))]


def _program(step: LeafStep, scalars: Any, leaf: Leaf) -> Program:
    """The step of a leaf. An update does not lie over the gradient: where that is an argument, XLA would copy it."""
    return program(step, scalars, leaf, over_gradient=False)


def _call(
    step: LeafStep, its: Program, operands: Sequence[jax.Array], leaves: Sequence[Leaf]
) -> list[tuple[jax.Array, Any]]:
    slots, arrays = cuda.slots(its), Arrays(step, words(its, operands, leaves))
    for leaf in leaves:
        arrays.add(leaf, its)
    rows = [rows_of(its, leaf) for leaf in leaves]
    sizes = {x.place: SIZES[x.dtype] * (-1 if x.kind == "block" else 1) for x in (*its.inputs, *its.outputs)}
    call = jax.ffi.ffi_call(TARGET, arrays.shapes, input_output_aliases=arrays.aliases, vmap_method="sequential")
    results = call(
        *arrays.arguments,
        text=cuda.source(its),
        grid=np.array([32 * cuda.WARPS, cuda.WARPS * cuda.TURNS]),
        operands=np.int64(len(operands)),
        reads=np.array([slots.index(x.place) for x in its.inputs]),
        writes=np.array([slots.index(x.place) for x in its.outputs]),
        sizes=np.array([sizes[place] for place in slots]),
        number=np.array([leaf.number for leaf in leaves]),
        rows=np.array([own.rows for own in rows]),
        columns=np.array([own.columns for own in rows]),
        axes=np.array([len(own.axes) for own in rows]),
    )
    return arrays.stepped(results)


def words(its: Program, operands: Sequence[jax.Array], leaves: Sequence[Leaf]) -> jax.Array:
    """What a kernel knows beside its arrays, uint32: the operands, and how the rows of each leaf lie."""
    parts: list[Any] = [jnp.stack(operands)] if operands else []
    known: list[int] = []
    for leaf in leaves:
        if leaf.place is None:
            known.append(0)
        else:
            parts += [np.array(known, np.uint32), leaf.place.origin[None]]
            known = []
        known += [x % 2**32 for axis in rows_of(its, leaf).axes for x in axis]
    return jnp.concatenate([*parts, np.array(known, np.uint32)])


@functools.cache
def _refused() -> str:
    """Why the kernels cannot be had here; "" if they can. JAX is told of the custom call."""
    found: Any = library()
    if found is None:
        return "adamite-native is not installed"
    if not hasattr(found, "gpu_handlers"):
        return "adamite-native is too old: it has no kernels for GPUs"
    for device in jax.devices() if jax.default_backend() == "gpu" else ():
        if float(device.compute_capability) < 8:
            return f"kernels need compute capability 8.0, and {device.device_kind} has {device.compute_capability}"
    jax.ffi.register_ffi_target(TARGET, found.gpu_handlers(), platform="CUDA")
    return ""
