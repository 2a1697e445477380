"""Steps of leaves on NVIDIA's GPUs, by kernels that are printed when a step is traced and compiled when it first runs.

One custom call steps a group of leaves of one program by one kernel. NVRTC, which JAX' CUDA wheels bring, compiles the
text inside of the call, once for each GPU (`native/cpp/gpu.cc`). Settings are operands: another learning rate compiles
nothing. Groups are not larger, because the time that XLA takes for the aliases of one call grows with the square of
their number.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

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
        its = program_of(step, scalars, leaf)
        cuda.source(its)
    except UnsupportedError as error:
        return str(error)
    own = rows_of(its, leaf)
    return "it has 2^31 blocks or more" if own.rows * math.ceil(own.columns / BLOCK) >= 2**31 else ""


def run(step: LeafStep, scalars: Any, leaves: Sequence[Leaf]) -> list[tuple[jax.Array, Any]]:
    """The result of each leaf and what the state then holds; `why_not` must have said nothing for any of them."""
    programs = [program_of(step, scalars, leaf) for leaf in leaves]
    calls, members = [], []
    for its in {own.name: own for own in programs}.values():
        operands = its.operands(scalars)
        own = [i for i, other in enumerate(programs) if other.name == its.name]
        for start in range(0, len(own), GROUP):
            members.append(own[start : start + GROUP])
            calls.append(Call(its, operands, [leaves[i] for i in members[-1]]))
    together, begins = words(calls)
    results: dict[int, tuple[jax.Array, Any]] = {}
    for call, begin, own in zip(calls, begins, members, strict=True):
        results |= zip(own, _call(step, call, together, begin), strict=True)
    return [results[i] for i in range(len(leaves))]


class Call(NamedTuple):
    """Leaves that are stepped by one kernel."""

    program: Program
    operands: Sequence[jax.Array]
    leaves: Sequence[Leaf]


def program_of(step: LeafStep, scalars: Any, leaf: Leaf) -> Program:
    """The step of a leaf. An update does not lie over the gradient: where that is an argument, XLA would copy it."""
    return program(step, scalars, leaf, over_gradient=False)


def _call(step: LeafStep, call: Call, together: jax.Array, begin: int) -> list[tuple[jax.Array, Any]]:
    its, operands, leaves = call
    slots, arrays = cuda.slots(its), Arrays(step, together)
    for leaf in leaves:
        arrays.add(leaf, its)
    rows = [rows_of(its, leaf) for leaf in leaves]
    sizes = {x.place: SIZES[x.dtype] * (-1 if x.kind == "block" else 1) for x in (*its.inputs, *its.outputs)}
    kernel = jax.ffi.ffi_call(TARGET, arrays.shapes, input_output_aliases=arrays.aliases, vmap_method="sequential")
    results = kernel(
        *arrays.arguments,
        text=cuda.source(its),
        grid=np.array([32 * cuda.WARPS, cuda.WARPS * cuda.TURNS]),
        begin=np.int64(begin),
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


def words(calls: Sequence[Call]) -> tuple[jax.Array, list[int]]:
    """What kernels know beside their arrays, uint32, in one array for all calls; and where that of each call begins.

    Of each call the operands, and of each of its leaves the number of the first element and how the rows lie.
    """
    parts: list[Any] = []
    begins, count = [], 0
    for its, operands, leaves in calls:
        begins.append(count)
        own: list[Any] = [*operands]
        for leaf in leaves:
            own.append(0 if leaf.place is None else leaf.place.origin)
            own += [x % 2**32 for axis in rows_of(its, leaf).axes for x in axis]
        parts += own
        count += len(own)
    runs = [(computed, list(own)) for computed, own in itertools.groupby(parts, lambda x: isinstance(x, jax.Array))]
    arrays = [jnp.stack(own) if computed else np.array(own, np.uint32) for computed, own in runs]
    return jnp.concatenate(arrays), begins


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
