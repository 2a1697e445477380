"""Cautious AdamW, transcribed from Liang et al. 2024, arXiv:2411.16085."""

import numpy as np


def cautious_adamw(theta, gradients, learning_rate, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0):
    """The parameters, one tensor, after each gradient. `learning_rate`: a number or a function of the step from 0."""
    theta = np.array(theta, np.float64)
    m, v, path = np.zeros_like(theta), np.zeros_like(theta), []
    for t, g in enumerate(gradients, start=1):
        alpha = learning_rate(t - 1) if callable(learning_rate) else learning_rate
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        u = (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
        phi = (u * g > 0).astype(float)
        scale = phi.size / (phi.sum() + 1)
        theta = theta - alpha * (scale * phi * u + weight_decay * theta)
        path.append(theta)
    return np.stack(path)
