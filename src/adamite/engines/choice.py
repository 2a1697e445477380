"""Which engine steps which leaf, and why.

    xla       XLA, which fuses what it can. It takes every leaf.
    pallas    a kernel for TPUs. On CPUs it is interpreted, which only tests want.
    native    compiled steps for CPUs and for NVIDIA's GPUs, by the distribution adamite-native.
    auto      on a CPU native, where it is installed; on a TPU pallas, where it moves fewer bytes than XLA; else xla.
              Updates of leaves that are float32 throughout are XLA's, for they have Optax's bits. On GPUs native has to
              be asked for until it has been measured on one.

The platform is that for which a step is compiled. What an engine cannot take falls back to XLA, and is reported:
`adamite.memory_report` lists every leaf.
"""

import contextlib
import contextvars
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import AxisType

from adamite.engines import sharded
from adamite.engines.leaf_step import Leaf, LeafStep
from adamite.engines.native.library import library
from adamite.numerics import is_traced

ENGINES = ("auto", "xla", "pallas", "native")

PARTITIONED = ("cpu", "cuda")
"""Platforms on which XLA's partitioner is asked how leaves are spread over devices."""

NO_KERNEL = "no kernel is for this platform"


_asked: contextvars.ContextVar[str] = contextvars.ContextVar("adamite_engine", default="auto")


@contextlib.contextmanager
def asking(engine: str) -> Iterator[None]:
    """Ask for an engine in all updates inside that do not ask for another one."""
    token = _asked.set(engine)
    try:
        yield
    finally:
        _asked.reset(token)


def asked() -> str:
    """The engine that is asked for here."""
    return _asked.get()


class Choice(NamedTuple):
    """What was chosen for a leaf."""

    path: str
    """The leaf's path in its tree, as `jax.tree_util.keystr` writes it."""
    engine: str
    why: str
    """Why it is XLA; "" where it is a kernel."""


class Recorder(NamedTuple):
    """What is chosen, where arrays are sharded so."""

    choices: list[Choice]
    shardings: Mapping[str, Any]
    """Those of leaves that jit does not show, by their paths."""


_recorder: contextvars.ContextVar[Recorder | None] = contextvars.ContextVar("adamite_choices", default=None)


@contextlib.contextmanager
def recorded(shardings: Mapping[str, Any] | None = None) -> Iterator[list[Choice]]:
    """Collect what is chosen while steps are traced inside, for this host's platform.

    Args:
        shardings: those of leaves that jit does not show, by their paths. A leaf that is not in it is on one device.
    """
    recorder = Recorder([], shardings or {})
    token = _recorder.set(recorder)
    try:
        yield recorder.choices
    finally:
        _recorder.reset(token)


def is_recording() -> bool:
    """Whether anybody wants to know what is chosen."""
    return _recorder.get() is not None


def record(asked: str, step: LeafStep, scalars: Any, leaves: list[Leaf]) -> None:
    """Note what is chosen for these leaves, where anybody wants to know."""
    recorder = _recorder.get()
    if recorder is not None:
        for leaf in leaves:
            chosen = choose(asked, platform_of(leaf), step, scalars, leaf, recorder.shardings.get(leaf.path))
            recorder.choices.append(Choice(leaf.path, *chosen))


def platform_of(leaf: Leaf) -> str:
    """That of the leaf's device; of the host's first device, if the leaf is traced."""
    device = jax.devices()[0] if is_traced(leaf.g) else next(iter(leaf.g.devices()))
    platform = jax.default_backend() if is_traced(leaf.g) else device.platform
    if platform != "gpu":
        return platform
    return "rocm" if "rocm" in device.client.platform_version.lower() else "cuda"


def may_have_kernel(asked: str, step: LeafStep, leaf: Leaf) -> bool:
    """Whether a kernel of any platform may take the leaf."""
    return asked != "xla" and step.elementwise and not (asked == "auto" and _has_optax_bits(step, leaf))


def choose(
    asked: str, platform: str, step: LeafStep, scalars: Any, leaf: Leaf, sharding: Any = None
) -> tuple[str, str]:
    """The engine that takes a leaf, and why it is XLA, "" where it is not.

    Args:
        asked: one of `ENGINES`.
        platform: "cpu", "tpu", "cuda" or another one of JAX's.
        step: what is done.
        scalars: what it takes once.
        leaf: the leaf.
        sharding: that of the leaf, if jit does not show it and it is on several devices.
    """
    engine = asked if asked != "auto" else {"cpu": "native", "tpu": "pallas"}.get(platform, "xla")
    why = _why_not(asked, engine, platform, step, scalars, leaf, sharding)
    return ("xla", why) if why else (engine, "")


def _why_not(asked: str, engine: str, platform: str, step: LeafStep, scalars: Any, leaf: Leaf, sharding: Any) -> str:
    """Why the engine does not take the leaf; "" if it does."""
    if asked == "xla":
        return "it was asked for"
    if engine == "xla":
        return "kernels for GPUs are not measured yet: ask for engine='native'" if platform == "cuda" else NO_KERNEL
    if engine == "pallas" and platform not in ("cpu", "tpu"):
        return "Pallas kernels are for TPUs"
    if engine == "native" and platform not in ("cpu", "cuda"):
        return "native kernels are for CPUs and NVIDIA's GPUs"
    if engine == "native" and library() is None:
        return "adamite-native is not installed"
    if not step.elementwise:
        return "its step needs the whole leaf"
    if asked == "auto" and _has_optax_bits(step, leaf):
        return "by XLA its update has Optax's bits"
    if why := _elsewhere(platform, step, leaf, sharding):
        return why
    if why := native(platform).why_not(step, scalars, leaf) if engine == "native" else pallas().why_not(step, leaf):
        return why
    plain = step.block == 1 or (leaf.g.ndim > 1 and leaf.g.shape[-1] % 128)
    return "XLA moves as few bytes" if asked == "auto" and engine == "pallas" and plain else ""


def _has_optax_bits(step: LeafStep, leaf: Leaf) -> bool:
    """Whether XLA's update is Optax's to the bit: where all but moments is float32, and these are as Optax has them."""
    arrays = leaf.g if leaf.p is None else (leaf.g, leaf.p)
    short = any(x.dtype.itemsize < 4 for x in jax.tree.leaves(arrays))
    return not (step.ends_with_weights or short or step.few_bits(leaf.stored))


def _elsewhere(platform: str, step: LeafStep, leaf: Leaf, sharding: Any) -> str:
    """Why a kernel cannot have the leaf where it is; "" if it can."""
    if sharded.sharding_of(leaf) is not None:
        return sharded.why_not(step, leaf)
    if not is_traced(leaf.g):
        alone = all(len(x.sharding.device_set) == 1 for x in leaf.arrays if isinstance(x, jax.Array))
        return "" if alone else "it is on several devices"
    if is_partly_manual(leaf):
        return "it is inside of a shard_map that is not over all axes of the mesh"
    if platform in PARTITIONED or sharding is None or sharding.num_devices == 1:
        return ""
    return "jit does not show on which of several devices it is: use adamite.sharding.placed, or Explicit axes"


def is_partly_manual(leaf: Leaf) -> bool:
    """Whether the leaf is one device's own along some axes of a mesh, and not along others."""
    mesh = jax.typeof(leaf.g).sharding.mesh
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    others = math.prod(mesh.shape[name] for name, kind in kinds if kind is not AxisType.Manual)
    return AxisType.Manual in mesh.axis_types and others > 1


def is_hidden(leaf: Leaf) -> bool:
    """Whether jit does not show on which devices the leaf is."""
    if not is_traced(leaf.g) or leaf.sharding is not None:
        return False
    mesh = jax.typeof(leaf.g).sharding.mesh
    return not (AxisType.Manual in mesh.axis_types or AxisType.Explicit in mesh.axis_types)


def native(platform: str) -> Any:
    """The engine for a platform, imported where it is wanted."""
    from adamite.engines.native import cpu, gpu

    return gpu if platform == "cuda" else cpu


def pallas() -> Any:
    """The engine, imported where it is wanted: others should not wait for Pallas."""
    from adamite.engines import pallas

    return pallas
