"""AdaBelief: Zhuang et al. 2020, arXiv:2010.07468, Algorithm 2, its one eps in two: in s, and beside the root.

Nesterov's momentum as in `adam`.
"""

import numpy as np


def adabelief(theta, gradients, learning_rate, b1=0.9, b2=0.999, eps=1e-16, eps_root=1e-16, *, nesterov=False):
    """The parameters after each gradient, in float64.

    `learning_rate` is a number or a function of the number of updates so far.
    """
    theta = np.array(theta, np.float64)
    m, s = np.zeros_like(theta), np.zeros_like(theta)
    path = []
    for t, g in enumerate(gradients, start=1):
        alpha = learning_rate(t - 1) if callable(learning_rate) else learning_rate
        m = b1 * m + (1 - b1) * g
        s = b2 * s + (1 - b2) * (g - m) ** 2 + eps_root
        m_hat = m / (1 - b1**t)
        if nesterov:
            m_hat = b1 * m / (1 - b1 ** (t + 1)) + (1 - b1) * g / (1 - b1**t)
        theta = theta - alpha * m_hat / (np.sqrt(s / (1 - b2**t)) + eps)
        path.append(theta)
    return np.stack(path)
