"""Rectified Adam: Liu et al. 2020, arXiv:1908.03265, Algorithm 2.

With a threshold (the paper's is rho > 4), eps, and Nesterov's momentum as in `adam`.
"""

import numpy as np


def radam(theta, gradients, learning_rate, b1=0.9, b2=0.999, eps=1e-8, eps_root=0.0, threshold=5.0, *, nesterov=False):
    """The parameters after each gradient, in float64.

    `learning_rate` is a number or a function of the number of updates so far.
    """
    theta = np.array(theta, np.float64)
    m, v = np.zeros_like(theta), np.zeros_like(theta)
    longest = 2 / (1 - b2) - 1
    path = []
    for t, g in enumerate(gradients, start=1):
        alpha = learning_rate(t - 1) if callable(learning_rate) else learning_rate
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g * g
        direction = m / (1 - b1**t)
        if nesterov:
            direction = b1 * m / (1 - b1 ** (t + 1)) + (1 - b1) * g / (1 - b1**t)
        length = longest - 2 * t * b2**t / (1 - b2**t)
        if length >= threshold:
            r = np.sqrt((length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length))
            direction = r * direction / (np.sqrt(v / (1 - b2**t) + eps_root) + eps)
        theta = theta - alpha * direction
        path.append(theta)
    return np.stack(path)
