"""The trees and the formats that `make gpu` steps."""

from typing import Any


def gpt2_small() -> list[tuple[int, ...]]:
    """The 148 arrays of GPT-2 small: 124,439,808 parameters."""
    d, layers = 768, 12
    norm = [(d,), (d,)]
    block = [*norm, (d, 3 * d), (3 * d,), (d, d), (d,), *norm, (d, 4 * d), (4 * d,), (4 * d, d), (d,)]
    return [(50257, d), (1024, d), *block * layers, *norm]


def trees(tiny: bool) -> dict[str, list[tuple[int, ...]]]:
    """Shapes of leaves, by the name of the tree."""
    if tiny:
        return {"leaf": [(64, 512)], "gpt2": [(50, 128), (64,), (7, 300), (32, 256)], "many": [(4096,)] * 20}
    return {"leaf": [(16384, 16384)], "gpt2": gpt2_small(), "many": [(4096,)] * 1000}


MOMENTS = ("float32", "bfloat16", "int8")
ROUNDINGS = (None, "stochastic", "residual8", "residual16")
FORMATS = {
    f"{moments}, {rounding or 'float32'} weights": (moments, rounding) for rounding in ROUNDINGS for moments in MOMENTS
}
"""Moments and rounding of the weights: these are float32 without one, else bfloat16."""


def adamw(name: str) -> tuple[Any, Any]:
    """The optimizer of a format, and the dtype of weights and gradients."""
    import jax.numpy as jnp

    import adamite

    moments, rounding = FORMATS[name]
    tx = adamite.adamw(3e-4, weight_decay=0.1, moments=moments, rounding=rounding)
    return tx, jnp.bfloat16 if rounding else jnp.float32
