"""Lion: Chen et al. 2023, arXiv:2302.06675, Algorithm 2; optax's two softer signs beside the paper's."""

import numpy as np


def lion(theta, gradients, learning_rate, b1=0.9, b2=0.99, weight_decay=1e-3, *, mode="hard", smooth_beta=1.0):
    """The parameters after each gradient, in float64.

    `learning_rate` is a number or a function of the number of updates so far.
    """
    theta, m = np.array(theta, np.float64), np.zeros(np.shape(theta))
    soft_sign = {
        "hard": np.sign,
        "smooth": lambda c: np.tanh(smooth_beta * c),
        "refined": lambda c: np.clip(c, -1, 1),
    }[mode]
    path = []
    for t, g in enumerate(gradients):
        alpha = learning_rate(t) if callable(learning_rate) else learning_rate
        c = b1 * m + (1 - b1) * g
        theta = theta - alpha * (soft_sign(c) + weight_decay * theta)
        m = b2 * m + (1 - b2) * g
        path.append(theta)
    return np.stack(path)
