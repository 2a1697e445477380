"""ADOPT, Taniguchi et al. 2024, arXiv:2411.02853, clipped: gradient 0 starts v, gradients 1, 2, ... are followed."""

import numpy as np


def adopt(
    theta,
    gradients,
    learning_rate,
    b1=0.9,
    b2=0.9999,
    eps=1e-6,
    *,
    nesterov=False,
    use_clipping=True,
    clip_value_fn=lambda t: t**0.25,
):
    """The parameters after each gradient, in float64."""
    theta = np.array(theta, np.float64)
    m, v = np.zeros_like(theta), np.abs(gradients[0]) ** 2
    path = [theta]
    for t, g in enumerate(gradients[1:], start=1):
        alpha = learning_rate(t) if callable(learning_rate) else learning_rate
        ratio = g / np.maximum(np.sqrt(v), eps)
        if use_clipping:
            ratio = np.clip(ratio, -clip_value_fn(t), clip_value_fn(t))
        m = b1 * m + (1 - b1) * ratio
        theta = theta - alpha * (b1 * m + (1 - b1) * ratio if nesterov else m)
        v = b2 * v + (1 - b2) * np.abs(g) ** 2
        path.append(theta)
    return np.stack(path)
