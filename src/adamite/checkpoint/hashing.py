"""SHA-256 of arrays, each device's part by itself.

An array that is laid over a mesh is a grid of parts. Each part is hashed where it is, by one process, from its bytes in
C order, little-endian; the array's hash is that of its parts' hashes, in C order of the grid. So no process needs more
than its own parts. To check an array that has come to another mesh, it is cut along the grid that it had.
"""

import collections
import hashlib
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

Index = tuple[slice, ...]

THREADS = min(16, os.cpu_count() or 1)


def grid(x: Any) -> tuple[int, ...]:
    """Into how many parts an array is cut along each axis."""
    sharding = getattr(x, "sharding", None)
    if sharding is None or not len(x.shape):
        return (1,) * len(x.shape)
    part = sharding.shard_shape(x.shape)
    return tuple(n // m if m else 1 for n, m in zip(x.shape, part, strict=True))


def sha256(arrays: Sequence[Any], grids: Sequence[tuple[int, ...]]) -> list[str]:
    """The hash of each array, cut along its grid, in hexadecimal. All processes must call it with the same arrays.

    Args:
        arrays: of JAX, which may be laid over several processes; or of NumPy, the same in all of them.
        grids: along each axis of each array, into how many parts. They divide the shapes.
    """
    digests = [np.zeros((int(np.prod(cut, dtype=np.int64)), 32), np.uint8) for cut in grids]

    def hash_part(number: int, part: int, fetch: Callable[[], np.ndarray]) -> None:
        flat = np.ascontiguousarray(fetch()).reshape(-1).view(np.uint8)
        digests[number][part] = np.frombuffer(hashlib.sha256(flat.data).digest(), np.uint8)

    with ThreadPoolExecutor(THREADS) as pool:  # hashlib leaves the interpreter free
        waiting: collections.deque[Future[None]] = collections.deque()
        for number, (x, cut) in enumerate(zip(arrays, grids, strict=True)):
            for part, fetch in _jobs(x, cut):
                waiting.append(pool.submit(hash_part, number, part, fetch))
                if len(waiting) > THREADS:  # so many parts may be in memory at a time
                    waiting.popleft().result()
        for job in waiting:
            job.result()
    if jax.process_count() > 1:
        everyone = multihost_utils.process_allgather(np.concatenate(digests))
        whole = np.max(np.asarray(everyone), axis=0)
        digests = np.split(whole, np.cumsum([len(d) for d in digests])[:-1])
    return [hashlib.sha256(parts.tobytes()).hexdigest() for parts in digests]


def _jobs(x: Any, cut: tuple[int, ...]) -> Iterator[tuple[int, Callable[[], np.ndarray]]]:
    """Which parts this process hashes, each with what fetches it."""
    size = tuple(n // k for n, k in zip(x.shape, cut, strict=True))
    parts = list(itertools.product(*map(range, cut)))
    if isinstance(x, jax.Array) and grid(x) == cut:  # as it lies
        number = {part: i for i, part in enumerate(parts)}
        for shard in x.addressable_shards:
            if shard.replica_id == 0:
                starts = [index.indices(n)[0] for index, n in zip(shard.index, x.shape, strict=True)]
                at = tuple(start // max(n, 1) for start, n in zip(starts, size, strict=True))
                yield number[at], lambda shard=shard: np.asarray(shard.data)
        return
    for i, part in enumerate(parts):
        index = tuple(slice(p * n, (p + 1) * n) for p, n in zip(part, size, strict=True))
        mine = i % jax.process_count() == jax.process_index()
        if not isinstance(x, jax.Array) or x.is_fully_addressable:
            if mine:
                yield i, lambda index=index: np.asarray(x)[index]
        else:
            everywhere = _gathered(x, index)
            if mine:
                yield i, lambda everywhere=everywhere: np.asarray(everywhere.addressable_data(0))


def _gathered(x: jax.Array, index: Index) -> jax.Array:
    """A part of an array of several processes, on all devices."""
    assert isinstance(x.sharding, NamedSharding)
    return jax.jit(lambda x: x[index], out_shardings=NamedSharding(x.sharding.mesh, PartitionSpec()))(x)
