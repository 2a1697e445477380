"""A kernel on each device's own part of a leaf where jit does not show the sharding: on meshes of Auto axes.

XLA's partitioner asks, when it knows how a leaf is sharded, what one device does (`custom_partitioning`). Shardy, which
decides the shardings, is given a rule: each axis of the gradient is a factor, and the last axis of a leaf in blocks is
two factors, (block, within). A device reads the number of its part's first element from a table.

Where a sharding cuts blocks, the leaf is sharded along another axis for the step. Each number moves to another device
and back, where XLA's own step would gather the leaf.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.custom_partitioning import ArrayMapping, CompoundFactor, SdyShardingRule, custom_partitioning
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from adamite.engines import xla
from adamite.engines.deferred import Target, deferred
from adamite.engines.leaf_step import Leaf, LeafStep, Place, block_of, kind, result_types, split
from adamite.random_bits import row_major

GROUP = 64
"""Leaves that are partitioned together, at most, unless an engine wants more."""

DEVICE = "adamite_device"
"""The one axis of the mesh on which a device's part is stepped."""

Engine = Callable[[Any, Sequence[Leaf]], list[tuple[jax.Array, Any]]]
"""``engine(scalars, leaves) -> results``, of leaves on one device."""


def run(
    engine: Engine, step: LeafStep, scalars: Any, leaves: Sequence[Leaf], group: int = GROUP
) -> list[tuple[jax.Array, Any]]:
    """The leaves after a step by `engine`, each device its own parts, so many leaves together."""
    groups = [leaves[start : start + group] for start in range(0, len(leaves), group)]
    return [result for group in groups for result in _run(engine, step, scalars, group)]


def _run(engine: Engine, step: LeafStep, scalars: Any, leaves: Sequence[Leaf]) -> list[tuple[jax.Array, Any]]:
    arrays, put = split((scalars, leaves))
    numbers = len(split(scalars)[0])

    def step_parts(arrays: Sequence[jax.Array], places: Iterable[Place | None]) -> list[jax.Array]:
        scalars, own = put(arrays)
        parts = [leaf._replace(place=place) for leaf, place in zip(own, places, strict=True)]
        return jax.tree.leaves(engine(scalars, parts))

    def whole(*values: jax.Array) -> tuple[jax.Array, ...]:
        own = deferred(lambda _, *values: step_parts(values, [None] * len(leaves)), result_types(step, leaves), *values)
        return tuple(own)

    def partition(mesh: Any, arguments: Sequence[Any], results: Any) -> tuple[Any, ...]:
        del mesh, results
        gradients = [leaf.g for leaf in put(arguments)[1]]
        devices = list(gradients[0].sharding.devices_indices_map(gradients[0].shape))
        flat_mesh = Mesh(np.array(devices), (DEVICE,))
        everywhere = NamedSharding(flat_mesh, PartitionSpec())
        origins, inputs, outputs = [], [everywhere] * numbers, []
        for leaf, gradient in zip(leaves, gradients, strict=True):
            own = _in_whole_blocks(gradient.sharding, leaf.g.shape, block_of(step, leaf), flat_mesh)
            of_arrays = [everywhere if kind(x, leaf.g, step.block) == "all" else own for x in leaf.arrays]
            inputs += of_arrays
            outputs += [own, *of_arrays[len(of_arrays) - len(leaf.kept) :]]
            origins.append(_origins(own, leaf.g.shape))

        def local(*values: jax.Array) -> tuple[jax.Array, ...]:
            device = jax.lax.axis_index(DEVICE)
            places = [Place(leaf.g.shape, jnp.asarray(o)[device]) for leaf, o in zip(leaves, origins, strict=True)]
            return tuple(step_parts(values, places))

        return flat_mesh, local, tuple(outputs), tuple(inputs)

    call = custom_partitioning(whole)
    call.def_partition(
        partition,
        infer_sharding_from_operands=None,
        sharding_rule=_rule(numbers, step, leaves),
        decode_shardings=False,
    )
    by_kernel = jax.custom_batching.custom_vmap(lambda *values: call(*values))

    @by_kernel.def_vmap
    def _batch(_: int, is_batched: Sequence[bool], *values: jax.Array) -> Any:
        """There is no rule for one more axis. On several devices XLA takes the step."""
        axes = tuple(0 if batched else None for batched in is_batched)

        def batched(target: Target, *values: jax.Array) -> Any:
            def one(*values: jax.Array) -> list[jax.Array]:
                if target.devices == 1:
                    return step_parts(values, [None] * len(leaves))
                return jax.tree.leaves(xla.run(step, *put(values), devices=target.devices))

            return jax.vmap(one, axes)(*values)

        types = jax.make_jaxpr(functools.partial(batched, Target()))(*values).out_avals
        new = tuple(deferred(batched, types, *values))
        return new, tuple(True for _ in new)

    new = iter(by_kernel(*arrays))
    return [(next(new), jax.tree.map(lambda _: next(new), leaf.stored)) for leaf in leaves]


def _rule(numbers: int, step: LeafStep, leaves: Sequence[Leaf]) -> SdyShardingRule:
    """How the axes of arguments and results belong together."""
    arguments, results = [ArrayMapping() for _ in range(numbers)], []
    sizes: dict[str, int] = {}
    whole: dict[str, None] = {}  # factors that are not cut, in the order in which they are met
    for i, leaf in enumerate(leaves):
        block = block_of(step, leaf)
        mappings = [_mapping(f"l{i}", j, x, leaf.g, block, sizes, whole) for j, x in enumerate(leaf.arrays)]
        arguments += mappings
        results += [mappings[0], *mappings[len(mappings) - len(leaf.kept) :]]
        if block > 1:
            sizes.pop(f"l{i}d{leaf.g.ndim - 1}", None)  # a factor that is a whole axis has that axis' size
    factors: Any = sizes
    return SdyShardingRule(tuple(arguments), tuple(results), need_replication_factors=tuple(whole), **factors)


def _mapping(
    leaf: str, number: int, x: Any, g: Any, block: int, sizes: dict[str, int], whole: dict[str, None]
) -> ArrayMapping:
    """The factors of an array's axes."""
    what = kind(x, g, block)
    if what == "all":
        factors = [f"{leaf}a{number}d{axis}" for axis in range(x.ndim)]
        whole |= dict.fromkeys(factors)
        return ArrayMapping(*factors)
    axes: list[Any] = [f"{leaf}d{axis}" for axis in range(g.ndim)]
    if block > 1 and g.ndim:
        length, last = g.shape[-1], axes[-1]
        if length % block == 0 and length > block:
            if what == "each":
                axes[-1] = CompoundFactor(last, f"{leaf}within")
                sizes |= {last: length // block, f"{leaf}within": block}
        else:  # a block is short, or the only one: no device has a part of the axis
            axes[-1] = f"{leaf}{what}"
            whole[axes[-1]] = None
    return ArrayMapping(*axes)


def _in_whole_blocks(sharding: Any, shape: tuple[int, ...], block: int, flat_mesh: Mesh) -> Any:
    """The sharding of a leaf, if all devices have equal parts and whole blocks; else one that is so."""
    part = sharding.shard_shape(shape)
    equal = all(n % m == 0 for n, m in zip(shape, part, strict=True))
    if equal and (not shape or part[-1] == shape[-1] or part[-1] % block == 0):
        return sharding
    rows = next((axis for axis, length in enumerate(shape[:-1]) if length % flat_mesh.size == 0), None)
    spec = [] if rows is None else [*[None] * rows, DEVICE]
    return NamedSharding(flat_mesh, PartitionSpec(*spec))


def _origins(sharding: Any, shape: tuple[int, ...]) -> np.ndarray:
    """The number in the leaf of the first element that each device has, uint32."""
    strides = row_major(shape)
    firsts = [
        sum((index.start or 0) * stride for index, stride in zip(indices, strides, strict=True))
        for indices in sharding.devices_indices_map(shape).values()
    ]
    return np.array([first % 2**32 for first in firsts], np.uint32)
