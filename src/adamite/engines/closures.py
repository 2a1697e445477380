"""Arrays that functions refer to in their surroundings, as those that `optax.inject_hyperparams` builds at each step.

A step may be traced when the program is lowered, and on another mesh. The arrays of its surroundings are then known no
more, so that it is given others in their place.
"""

import functools
import types
from collections.abc import Sequence
from typing import Any, TypeVar

import jax

T = TypeVar("T")


def closed_over(value: Any) -> list[jax.Array]:
    """The arrays that a function refers to beside its arguments, or that functions in a tuple, dict or object do."""
    found: dict[int, jax.Array] = {}
    seen: dict[int, Any] = {}  # by identity; held, so that none is another's after it
    open_ = [value]
    while open_:
        value = open_.pop()
        if id(value) in seen or isinstance(value, (str, int, float, type, types.ModuleType)):
            continue
        seen[id(value)] = value
        if isinstance(value, jax.Array):
            found[id(value)] = value
        elif parts := _parts(value):
            open_ += parts
        elif isinstance(value, types.MethodType):
            open_ += [value.__func__, value.__self__]
        elif not isinstance(value, types.FunctionType):
            open_.append(getattr(value, "__dict__", None))
    return list(found.values())


def given(value: T, arrays: Sequence[jax.Array], others: Sequence[jax.Array]) -> T:
    """`value`, with `others` in place of the `arrays` that it closes over. What closes over none stays as it is."""
    new: dict[int, Any] = {id(x): other for x, other in zip(arrays, others, strict=True)}

    def put(x: Any) -> Any:
        if id(x) not in new:
            new[id(x)] = x  # for a function that refers to itself
            parts = _parts(x)
            own = [put(inside) for inside in parts]
            if any(a is not b for a, b in zip(parts, own, strict=True)):
                new[id(x)] = _of_parts(x, own)
        return new[id(x)]

    return put(value)


def _parts(value: Any) -> Sequence[Any]:
    """What may be replaced in a function or a container."""
    if isinstance(value, functools.partial):
        return value.func, value.args, value.keywords
    if isinstance(value, dict):
        return tuple(value.values())
    if isinstance(value, (tuple, list)):
        return value
    if isinstance(value, types.FunctionType):
        cells = [cell.cell_contents if _is_filled(cell) else None for cell in value.__closure__ or ()]
        return *cells, value.__defaults__, value.__kwdefaults__
    return ()


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is cell.cell_contents
    except ValueError:
        return False


def _of_parts(value: Any, parts: list[Any]) -> Any:
    """A function or a container like `value`."""
    if isinstance(value, functools.partial):
        function, args, keywords = parts
        return functools.partial(function, *args, **keywords)
    if isinstance(value, dict):
        return dict(zip(value, parts, strict=True))
    if isinstance(value, (tuple, list)):
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    *contents, defaults, keyword_defaults = parts
    cells = tuple(map(types.CellType, contents))
    function = types.FunctionType(value.__code__, value.__globals__, value.__name__, defaults, cells)
    function.__kwdefaults__ = keyword_defaults
    return function
