"""What a GPU does in a run, from JAX's profiler: kernels, their time, and the calls of the driver."""

import collections
import glob
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from adamite.engines.native.gpu import TARGET


def launches(lowered: Any) -> int:
    """How many calls of adamite's kernels a lowered program has."""
    return lowered.as_text().count(f"@{TARGET}(")


class Events(NamedTuple):
    """What was seen.

    Attributes:
        kernels: how often each ran on the device, copies too.
        ms: what they took together.
        calls: how often the driver was called to launch.
    """

    kernels: dict[str, int]
    ms: float
    calls: dict[str, int]


def events(run: Callable[[], Any]) -> Events:
    """What is done in a run, which returns arrays to wait for. Nothing is seen where there is no GPU."""
    from jax.profiler import ProfileData

    kernels, calls = collections.Counter(), collections.Counter()
    total = 0.0
    with tempfile.TemporaryDirectory() as folder:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0
        with jax.profiler.trace(folder, profiler_options=options):
            jax.block_until_ready(run())
        for path in glob.glob(f"{folder}/**/*.xplane.pb", recursive=True):
            for plane in ProfileData.from_file(path).planes:
                on_device = plane.name.startswith("/device:GPU")
                for line in plane.lines:
                    for event in line.events:
                        if on_device and line.name.startswith("Stream"):
                            kernels[event.name] += 1
                            total += event.duration_ns / 1e6
                        elif not on_device and event.name.startswith("cu") and "aunch" in event.name:
                            calls[event.name] += 1
    return Events(dict(kernels), total, dict(calls))
