"""The 8-bit maps as sorted tables, and the nearest entry by looking at all of them.

Cubic codes: cubes of whole numbers, on straight lines between the powers of two. UE5M3: 8 numbers to each power of two,
from 1 down.
"""

import numpy as np


def cubic_signed():
    """The 255 values in ascending order: 127 below 0, 0 and 127 above."""
    above = _cubes(127)
    return np.concatenate([-above[:0:-1], above])


def cubic_unsigned():
    """The 256 values in ascending order."""
    return _cubes(255)


def ue5m3():
    """The 256 values in ascending order."""
    numbers = [(8 + eighths) / 8 * 2.0**power for power in range(-1, -33, -1) for eighths in range(7, -1, -1)]
    return np.array([0.0, *numbers[:254][::-1], 1.0])


def nearest(z, table):
    """The entry of the table that is nearest to each number, and how far it is."""
    far = np.abs(np.asarray(z, np.float64)[:, None] - table)
    return table[far.argmin(1)], far.min(1)


def neighbours(z, table):
    """The last entry of the table that is not above each number (or the first), and the first that is not below it."""
    z = np.asarray(z, np.float64)
    below = np.searchsorted(table, z, side="right") - 1
    return table[np.maximum(below, 0)], table[np.searchsorted(table, z)]


def _cubes(last):
    powers = np.array([0.0, *2.0 ** np.arange(9)])
    cubes = np.interp(np.arange(last + 1), powers, powers**3)
    return cubes / cubes[-1]
