"""Stepping leaves, each by its engine.

Eager arrays show their devices. Under jit the step of each platform is traced when it is lowered (see `deferred`). An
engine steps leaves of one device. Of a leaf that is on several, it is given each device's part. The sharding is

    shown    by the leaf's type, on a mesh of Explicit axes, or by an eager array (see `sharded`);
    told     by `adamite.sharding.placed` or `zero1` (see `sharded`);
    found    by XLA's partitioner, on a mesh of Auto axes, on CPUs and NVIDIA's GPUs (see
             `partitioned`).
"""

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax

from adamite.engines import sharded, xla
from adamite.engines.choice import (
    PARTITIONED,
    choose,
    is_hidden,
    may_have_kernel,
    native,
    pallas,
    platform_of,
    record,
)
from adamite.engines.leaf_step import Leaf, LeafStep, result_types, split
from adamite.engines.native.library import library
from adamite.numerics import is_traced

EAGER_STEPS = 4
"""Programs of eager steps by kernels, at most. A schedule that returns Python numbers needs one for each number."""

Results = list[tuple[jax.Array, Any]]
"""Of each leaf the weights or the update, and what the state then holds."""


def run(asked: str, step: LeafStep, scalars: Any, leaves: Sequence[Leaf]) -> Results:
    """Step leaves, each by an engine that can take it.

    Args:
        asked: one of `choice.ENGINES`.
        step: what is done to each leaf.
        scalars: tree of arrays of shape (), numbers and None, the same for all leaves.
        leaves: the leaves.
    """
    if asked != "xla":
        record(asked, step, scalars, list(leaves))
    traced = any(is_traced(x) for x in jax.tree.leaves((scalars, step.closes_over, [leaf.arrays for leaf in leaves])))
    # How XLA steps lean leaves depends on the platform and the number of devices, known when the step is lowered.
    lean = [traced and (step.in_slices or step.few_bits(leaf.stored)) for leaf in leaves]
    undecided = [is_lean or may_have_kernel(asked, step, leaf) for is_lean, leaf in zip(lean, leaves, strict=True)]
    return _by_way(
        leaves,
        ["undecided" if later else "xla" for later in undecided],
        xla=lambda own: xla.run(step, scalars, own, max(map(_devices, own))),
        undecided=functools.partial(_under_jit if traced else _eagerly, asked, step, scalars),
    )


def _devices(leaf: Leaf) -> int:
    """On how many devices an eager leaf is."""
    return 1 if is_traced(leaf.g) else len(leaf.g.sharding.device_set)


def _by_way(leaves: Sequence[Leaf], ways: Sequence[str], **step: Callable[[list[Leaf]], Results]) -> Results:
    """The results of leaves that go several ways: ``step[way](leaves)``."""
    done: dict[int, tuple[jax.Array, Any]] = {}
    for way in dict.fromkeys(ways):
        own = [i for i, other in enumerate(ways) if other == way]
        done |= zip(own, step[way]([leaves[i] for i in own]), strict=True)
    return [done[i] for i in range(len(leaves))]


def _eagerly(asked: str, step: LeafStep, scalars: Any, leaves: Sequence[Leaf]) -> Results:
    """Steps of arrays whose devices are known. Those by kernels of one device are jitted."""
    platform = platform_of(leaves[0])
    chosen = [choose(asked, platform, step, scalars, leaf)[0] for leaf in leaves]
    _warn(asked, platform, step, leaves, chosen)
    plainly = functools.partial(_chosen, platform, step, chosen=chosen, devices=max(map(_devices, leaves)))
    alone = not any(sharded.sharding_of(leaf) for leaf in leaves)
    if step.closes_over or not alone or set(chosen) == {"xla"}:
        return plainly(scalars, leaves)
    arrays, put = split((scalars, leaves))
    values, structure = jax.tree.flatten((scalars, leaves))
    key = "eager", structure, tuple(x for x in values if not isinstance(x, jax.Array)), tuple(chosen)
    if key not in step.programs:
        if sum(key[0] == "eager" for key in step.programs) == EAGER_STEPS:
            return plainly(scalars, leaves)
        step.programs[key] = jax.jit(lambda arrays: plainly(*put(arrays)))
    return step.programs[key](arrays)


def _under_jit(asked: str, step: LeafStep, scalars: Any, leaves: Sequence[Leaf]) -> Results:
    """Steps for whatever platform they are compiled for. Their derivatives are those of XLA's step."""
    if any(map(is_traced, step.closes_over)):
        step, arrays = step.open()
        scalars = scalars, arrays
    arrays, put = split((scalars, leaves))

    @jax.custom_jvp
    def run(arrays: Sequence[jax.Array]) -> Results:
        branches = {
            platform: functools.partial(_on_platform, asked, platform, step, *put(arrays))
            for platform in ("cpu", "tpu", "cuda", "default")
        }
        return jax.lax.platform_dependent(**branches)

    @run.defjvp
    def _derivative(primals: Any, tangents: Any) -> Any:
        # It is traced at once, when nobody knows the number of devices; no result depends on it.
        return jax.jvp(lambda arrays: xla.run(step, *put(arrays), devices=jax.device_count()), primals, tangents)

    return run(arrays)


def _on_platform(asked: str, platform: str, step: LeafStep, scalars: Any, leaves: Sequence[Leaf]) -> Results:
    """Steps under jit on one platform. XLA's partitioner may be asked how leaves are spread over devices."""
    lowered = functools.partial(_deferred, functools.partial(_lowered, asked, platform), step, scalars)
    if platform not in PARTITIONED or asked == "xla" or not any(map(is_hidden, leaves)):
        return lowered(leaves)
    chosen = [choose(asked, platform, step, scalars, leaf)[0] for leaf in leaves]
    found = {name: functools.partial(_by_partitioner, platform, name, step, scalars) for name in OF_ONE_DEVICE}
    return _by_way(leaves, chosen, xla=lowered, **found)


def _by_partitioner(platform: str, engine: str, step: LeafStep, scalars: Any, leaves: list[Leaf]) -> Results:
    from adamite.engines import partitioned  # imported where it is wanted, as `deferred`: JAX imports much for both

    group = 512 if platform == "cuda" else partitioned.GROUP  # so that leaves of one kernel come together
    return partitioned.run(functools.partial(OF_ONE_DEVICE[engine], platform, step), step, scalars, leaves, group)


def _lowered(asked: str, platform: str, target: Any, step: LeafStep, scalars: Any, leaves: Sequence[Leaf]) -> Results:
    """Steps while they are lowered: it is known for what."""
    chosen = [choose(asked, platform, step, scalars, leaf)[0] for leaf in leaves]
    _warn(asked, platform, step, leaves, chosen)
    if platform == "tpu" and "pallas" in chosen:
        chosen = [e if pallas().is_lowered(step, leaf) else "xla" for e, leaf in zip(chosen, leaves, strict=True)]
    if target.devices > 1:
        chosen = ["xla" if is_hidden(leaf) else engine for leaf, engine in zip(leaves, chosen, strict=True)]
    if target.platforms > 1:  # for which Pallas cannot be lowered at once
        chosen = ["xla" if engine == "pallas" else engine for engine in chosen]
    return _chosen(platform, step, scalars, leaves, chosen, target.devices)


def _chosen(
    platform: str, step: LeafStep, scalars: Any, leaves: Sequence[Leaf], chosen: Sequence[str], devices: int
) -> Results:
    """Steps of leaves by the engines chosen."""
    own = {name: functools.partial(_by_parts, platform, name, step, scalars) for name in OF_ONE_DEVICE}
    return _by_way(leaves, chosen, xla=lambda own: xla.run(step, scalars, own, devices, platform), **own)


def _by_parts(platform: str, name: str, step: LeafStep, scalars: Any, leaves: list[Leaf]) -> Results:
    """Steps by an engine. Where a leaf is spread over devices, each steps its own part."""
    engine = functools.partial(OF_ONE_DEVICE[name], platform, step)
    return _by_way(
        leaves,
        ["whole" if sharded.sharding_of(leaf) is None else "spread" for leaf in leaves],
        whole=functools.partial(engine, scalars),
        spread=functools.partial(sharded.run, engine, step, scalars),
    )


def _deferred(function: Callable[..., Results], step: LeafStep, scalars: Any, leaves: Sequence[Leaf]) -> Results:
    """``function(target, step, scalars, leaves)``, traced when it is lowered."""
    from adamite.engines.deferred import deferred

    arrays, put = split((scalars, leaves))

    def flat(target: Any, *arrays: jax.Array) -> list[jax.Array]:
        return jax.tree.leaves(function(target, step, *put(arrays)))

    new = iter(deferred(flat, _types(step, scalars, leaves), *arrays))
    return [(next(new), jax.tree.map(lambda _: next(new), leaf.stored)) for leaf in leaves]


def _types(step: LeafStep, scalars: Any, leaves: Sequence[Leaf]) -> list[Any]:
    """The types of the results: those of what they replace. Inside of shard_map they may vary over more axes."""
    arrays, put = split((scalars, leaves))
    if any(jax.typeof(x).manual_axis_type.varying for x in arrays):
        return list(jax.make_jaxpr(lambda arrays: xla.run(step, *put(arrays), devices=1))(arrays).out_avals)
    return result_types(step, leaves)


def _warn(asked: str, platform: str, step: LeafStep, leaves: Sequence[Leaf], chosen: Sequence[str]) -> None:
    """Warn once where moments of few bits are stepped by XLA, and a kernel could be had."""
    if asked != "auto" or not any(e == "xla" and step.few_bits(x.stored) for x, e in zip(leaves, chosen, strict=True)):
        return
    if platform == "cpu" and library() is None:
        _warn_once(
            "adamite-native is not installed: XLA steps moments of few bits, which takes several times as long. "
            "To install it: pip install adamite[native], or pip install ./native in a checkout"
        )


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)


def _by_native(platform: str, step: LeafStep, scalars: Any, leaves: Sequence[Leaf]) -> Results:
    return native(platform).run(step, scalars, leaves)


def _by_pallas(_: str, step: LeafStep, scalars: Any, leaves: Sequence[Leaf]) -> Results:
    """On CPUs it is interpreted."""
    run = functools.partial(pallas().run, step, scalars, leaves)
    return jax.lax.platform_dependent(tpu=run, default=functools.partial(run, interpret=True))


OF_ONE_DEVICE: dict[str, Callable[[str, LeafStep, Any, Sequence[Leaf]], Results]] = {
    "native": _by_native,
    "pallas": _by_pallas,
}
"""``engine(platform, step, scalars, leaves)``."""
