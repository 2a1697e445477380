"""LaProp, transcribed from Ziyin, Wang & Ueda 2020, arXiv:2002.04839, Algorithm 1."""

import numpy as np


def laprop(theta, gradients, learning_rate, b1=0.9, b2=0.999, eps=1e-15, weight_decay=0.0):
    """The parameters after each gradient. `learning_rate`: a number or a function of the number of updates so far."""
    theta = np.array(theta, np.float64)
    m, n, path = np.zeros_like(theta), np.zeros_like(theta), []
    for t, g in enumerate(gradients, start=1):
        alpha = learning_rate(t - 1) if callable(learning_rate) else learning_rate
        n = b2 * n + (1 - b2) * g**2
        m = b1 * m + (1 - b1) * g / (np.sqrt(n / (1 - b2**t)) + eps)
        theta = theta - alpha * (m / (1 - b1**t) + weight_decay * theta)
        path.append(theta)
    return np.stack(path)
