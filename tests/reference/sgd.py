"""Gradient descent with momentum.

Momentum: Polyak 1964. Nesterov's: Bengio, Boulanger-Lewandowski & Pascanu 2012, arXiv:1212.0901, section 3.5. The
learning rate is applied to the accumulated gradient.
"""

import numpy as np


def sgd(theta, gradients, learning_rate, momentum=None, nesterov=False):
    """The parameters after each gradient, in float64."""
    theta = np.array(theta, np.float64)
    velocity = np.zeros_like(theta)
    path = []
    for t, g in enumerate(gradients):
        alpha = learning_rate(t) if callable(learning_rate) else learning_rate
        direction = g
        if momentum is not None:
            velocity = momentum * velocity + g
            direction = momentum * velocity + g if nesterov else velocity
        theta = theta - alpha * direction
        path.append(theta)
    return np.stack(path)
