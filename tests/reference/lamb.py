"""LAMB, You et al. 2019, arXiv:1904.00962, Algorithm 2, for one layer. phi is the identity; a norm of 0 gives 1."""

import numpy as np


def lamb(
    theta,
    gradients,
    learning_rate,
    b1=0.9,
    b2=0.999,
    eps=1e-6,
    eps_root=0.0,
    weight_decay=0.0,
):
    """The parameters after each gradient, in float64; `theta` is one layer, of any shape."""
    theta = np.array(theta, np.float64)
    m, v = np.zeros_like(theta), np.zeros(theta.shape)
    path = []
    for t, g in enumerate(gradients, start=1):
        eta = learning_rate(t - 1) if callable(learning_rate) else learning_rate
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * np.abs(g) ** 2
        r = (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t) + eps_root) + eps)
        step = r + weight_decay * theta
        own, length = np.sqrt(np.sum(np.abs(theta) ** 2)), np.sqrt(np.sum(np.abs(step) ** 2))
        theta = theta - eta * (own / length if own > 0 and length > 0 else 1.0) * step
        path.append(theta)
    return np.stack(path)
