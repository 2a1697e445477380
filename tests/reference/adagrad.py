"""Adagrad, Duchi, Hazan & Singer 2011, Figure 1, diagonal, with its constant inside the root."""

import numpy as np


def adagrad(theta, gradients, learning_rate, initial_accumulator_value=0.1, eps=1e-7):
    """The parameters after each gradient, in float64."""
    theta = np.array(theta, np.float64)
    total = np.full(theta.shape, float(initial_accumulator_value))
    path = []
    for t, g in enumerate(gradients):
        alpha = learning_rate(t) if callable(learning_rate) else learning_rate
        total = total + np.abs(g) ** 2
        root = np.sqrt(total + eps)
        theta = theta - alpha * np.divide(g, root, out=np.zeros_like(theta), where=total > 0)
        path.append(theta)
    return np.stack(path)
