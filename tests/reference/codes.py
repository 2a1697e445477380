"""The 8-bit maps as sorted tables, and the nearest entry by looking at all of them.

Dynamic codes as their authors publish them (Dettmers et al. 2022, arXiv:2110.02861, section 2, and bitsandbytes'
`create_dynamic_map`): each of seven decades is cut into equal intervals, twice as many as in the decade below; the
values are the midpoints of the intervals, and 0 and 1. UE5M3: 8 numbers to each power of two, from 1 down.
"""

import numpy as np


def dynamic_signed():
    """The 256 values in ascending order: 127 below 0, 0, 127 above and 1."""
    above = _decades(fewest=1)
    return np.concatenate([-above[::-1], [0.0], above, [1.0]])


def dynamic_unsigned():
    """The 256 values in ascending order."""
    return np.concatenate([[0.0], _decades(fewest=2), [1.0]])


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


def _decades(fewest):
    values = []
    for decade in range(7):
        bounds = np.linspace(0.1, 1.0, fewest * 2**decade + 1)
        values.append(10.0 ** (decade - 6) * (bounds[:-1] + bounds[1:]) / 2)
    return np.concatenate(values)
