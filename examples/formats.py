"""What each way of keeping a moment makes of a number, against its size beside the largest of its block of 256.

Numbers are stored and read back, 4,000 of each size; you will see the root mean square of the relative error. A mean
gradient m is drawn as it is, a mean square v by its root, which is what the step divides by.

What to learn: bfloat16 has the same error everywhere. The codes of int8 lie close together near the largest number, 1%
and less apart, and grow sparse below it: a number of a ten-thousandth of the largest is kept to some 15%. For a mean
gradient that does little harm, and it may become 0. A mean square must not, for the step divides by it: it is kept by
its root, which has half as many decades, and nothing above 0 becomes 0. float8 has one error over almost five decades
of the root, and is useless beyond them.
"""

from pathlib import Path

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import picture

from adamite.random_bits import element_index, fold, random_bits
from adamite.storage import Blockwise, Dense, Storage

SIZES = np.logspace(0, -6, 61)
FORMATS: list[tuple[str, Storage, str, bool, tuple[int, int]]] = [
    ("bfloat16", Dense(jnp.dtype(jnp.bfloat16), seed=0), picture.GRAY, False, (30, -10)),
    ("int8, m", Blockwise(seed=None), picture.COLORS["Adam"], False, (16, 12)),
    ("int8, v", Blockwise(unsigned=True), picture.COLORS["momentum"], True, (40, -16)),
    ("float8, v", Blockwise(float8=True, unsigned=True), picture.COLORS["Adagrad"], True, (42, -10)),
]


def error(storage: Storage, size: float, root: bool) -> float:
    """Root mean square of the relative error of numbers of about that size, in blocks whose largest element is 1."""
    spread = np.random.default_rng(0).uniform(0.8, 1.25, (16, 256))
    x = np.minimum(size * spread, 1.0)
    x[:, 0] = 1.0
    x = jnp.asarray(x**2 if root else x, jnp.float32)
    stored = storage.fresh(x)
    kept = storage.decode(storage.encode(x, stored, lambda: random_bits(fold(0, 0), element_index(x.shape))))
    error = (jnp.sqrt(kept / x) if root else kept / x) - 1
    return float(jnp.sqrt(jnp.mean(error[:, 1:] ** 2)))


def main(out: Path) -> None:
    figure, axes = plt.subplots(figsize=(6.4, 3.4))
    for name, storage, color, root, (place, up) in FORMATS:
        errors = [error(storage, size, root) for size in SIZES]
        axes.loglog(SIZES, errors, color=color)
        picture.label(axes, SIZES[place], errors[place], name, color, dx=0, dy=up)
        at = {size: errors[int(np.abs(np.log10(SIZES) - np.log10(size)).argmin())] for size in (1e-1, 1e-2, 1e-4)}
        print(f"{name:10}" + "".join(f"  error at {size:g}: {value:.4f}" for size, value in at.items()))
    axes.invert_xaxis()
    axes.set_ylim(1e-3, 2)
    axes.set(xlabel="size beside the largest of its block (of v: the root)", title="Relative error of a stored moment")
    picture.save(figure, out / "formats.png")


if __name__ == "__main__":
    main(picture.folder(__doc__))
