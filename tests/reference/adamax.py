"""AdaMax: Kingma & Ba 2015, arXiv:1412.6980, Algorithm 2, with eps added to each gradient's size.

AdamaxW adds decoupled decay, multiplied by the learning rate.
"""

import functools

import numpy as np


def adamax(theta, gradients, learning_rate, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0):
    """The parameters after each gradient, in float64.

    `learning_rate` is a number or a function of the number of updates so far.
    """
    theta = np.array(theta, np.float64)
    m, u = np.zeros_like(theta), np.zeros_like(theta)
    path = []
    for t, g in enumerate(gradients, start=1):
        alpha = learning_rate(t - 1) if callable(learning_rate) else learning_rate
        m = b1 * m + (1 - b1) * g
        u = np.maximum(b2 * u, np.abs(g) + eps)
        theta = theta - alpha / (1 - b1**t) * m / u - alpha * weight_decay * theta
        path.append(theta)
    return np.stack(path)


adamaxw = functools.partial(adamax, weight_decay=1e-4)
