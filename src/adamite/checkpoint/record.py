"""What a user tells a checkpoint besides arrays: a copy, of what JSON has.

NaN and infinities come back as they are. They are written as Python's `json` writes them, ``NaN`` and ``Infinity``,
which stricter readers of JSON may refuse.
"""

from typing import Any

import jax
import numpy as np

from adamite.numerics import is_traced


def plain(value: Any, where: str = "record") -> Any:
    """Dicts with strings for keys, lists, strings, numbers, True, False and None; scalars of NumPy and JAX as numbers.

    Raises:
        TypeError: it is, or holds, something else; names the place.
    """
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{where} must have strings for keys, got {key!r:.80} of type {type(key).__name__}")
        return {str(key): plain(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if is_traced(value):
        raise TypeError(f"{where} must be known outside of jit, got a traced array")
    if isinstance(value, (np.generic, np.ndarray, jax.Array)) and value.shape == ():
        number = np.asarray(value).item()
        if isinstance(number, (bool, int, float, str)):
            return number
    elif value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{where} must be what JSON has, got {value!r:.80} of type {type(value).__name__}")
