"""Buckets for floats from 0 to 1, by their bits: how to find which of some limits a number has reached."""

import functools

ONE, MINUS_ZERO = 0x3F80, 0x8000
COUNT = 8


@functools.cache
def buckets(limits: tuple[int, ...]) -> tuple[int, int] | None:
    """Buckets with one limit in each of the lowest ones, and none in the others.

    Args:
        limits: the bits of floats between 0 and 1.

    Returns:
        `origin` and `factor`, with which ``(max(h - origin, 0) * factor) >> 16`` is the bucket of a float of which h is
        the upper half of the bits, and that of -0 is 0 modulo 16; None if there are no such buckets.
    """
    if len(limits) >= COUNT or list(limits) != sorted(limits):
        return None
    halves = [x >> 16 for x in limits]
    for origin in range(halves[0], halves[0] - 1024, -1):
        for factor in range((COUNT << 16) // (ONE - origin), 0, -1):

            def bucket(h: int, origin: int = origin, factor: int = factor) -> int:
                return max(h - origin, 0) * factor >> 16

            found = [bucket(h) for h in halves]
            if found == list(range(len(limits))) and bucket(ONE) < COUNT and bucket(MINUS_ZERO) % 16 == 0:
                return origin, factor
    return None
