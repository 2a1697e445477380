"""Operations with their constants in place, and what is known of their results."""

import itertools
import operator
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np


class Node(NamedTuple):
    """An operation.

    An argument is the name of another's result or of what is read, an integer, or the bits of a float after "#".
    """

    name: str
    kind: str
    dtype: str
    operation: str
    arguments: tuple[str, ...]
    types: tuple[str, ...]  # the arguments' dtypes
    table: tuple[str, ...] = ()


def is_integer(x: str) -> bool:
    """Whether an argument is an integer."""
    return x.lstrip("-").isdigit()


def is_float(x: str) -> bool:
    """Whether an argument is a float."""
    return x.startswith("#")


def value(x: str) -> Any:
    """The number that an argument is."""
    return np.uint32(int(x[1:])).view(np.float32) if is_float(x) else int(x)


def bits(x: float) -> str:
    """A float as an argument."""
    return f"#{int(np.float32(x).view(np.uint32))}"


class Limits(NamedTuple):
    """What a result is at least and at most; and whether it may be NaN."""

    low: float
    high: float
    nan: bool = False


ANYTHING = Limits(-np.inf, np.inf, True)
READ = {"int8": Limits(-128, 127), "uint8": Limits(0, 255), "bool": Limits(0, 1)}
LARGEST = float(np.finfo(np.float32).max)
EXPONENT = 0x7F800000


class Few(NamedTuple):
    """What a result is for each value of one integer that it depends on alone."""

    of: str
    """The integer; "" where the result is a constant."""
    dtype: str
    """That of the integer: an int32 is one of 0, 1, ..., and bytes come in the order of their bits."""
    values: np.ndarray
    operations: int
    """That lead from the integer to the result."""


class Nodes(dict[str, Node]):
    """Operations by the names of their results, in order, and what was found out about these."""

    def __init__(self, nodes: Iterable[tuple[str, Node]] = (), few: int = 8) -> None:
        super().__init__(nodes)
        self.few = few
        self.limits: dict[str, Limits] = {}
        self.values_of_few: dict[str, Few | None] = {}


def limits(x: str, nodes: Nodes, dtype: str = "") -> Limits:
    """As far as that follows from how a result is computed; `dtype` is its own."""
    if is_float(x) or is_integer(x):
        number = float(value(x))
        return ANYTHING if np.isnan(number) else Limits(number, number)
    if x not in nodes:
        return READ.get(dtype, ANYTHING)
    if x not in nodes.limits:
        nodes.limits[x] = _limits(nodes[x], nodes)
    return nodes.limits[x]


def _limits(node: Node, nodes: Nodes) -> Limits:
    if node.table:
        byte = node.types != ("int32",)
        low, high = (0, 255) if byte else limits(node.arguments[0], nodes)[:2]
        numbers = [float(value(y)) for y in node.table[max(int(low), 0) : int(high) + 1] or node.table]
        return Limits(min(numbers), max(numbers))
    if node.operation in ("larger_than", "smaller_than"):
        c, y = (limits(y, nodes) for y in node.arguments)
        pick = max if node.operation == "larger_than" else min
        return Limits(pick(y.low, c.low), pick(y.high, c.high), y.nan)
    if node.operation == "smaller_or":  # the constant instead of NaN
        y, c = (limits(y, nodes) for y in node.arguments)
        return Limits(min(y.low, c.low), min(y.high, c.high))
    if node.operation == "mul" and (found := _by_octaves(node, nodes)) is not None:
        return found
    given = [limits(y, nodes, t) for y, t in zip(node.arguments, node.types, strict=True)]
    if node.operation == "select_n":
        a, b = given[1:]
        if _is_nan(node.arguments[0], node.arguments[1], nodes):
            a = a._replace(nan=False)
        return Limits(min(a.low, b.low), max(a.high, b.high), a.nan or b.nan)
    operation = node.operation
    if operation == "bitcast_convert_type":
        operation = {"int32": "bits of", "float32": "float of"}.get(node.dtype, "")
    if node.dtype not in ("int32", "float32"):  # narrow integers wrap
        return READ.get(node.dtype, ANYTHING)
    low, high, nan = LIMITED[operation](*given) if operation in LIMITED else ANYTHING
    if node.dtype == "int32":
        return Limits(low, high, nan) if low >= -(2**31) and high < 2**31 else ANYTHING
    return Limits(low if low >= -LARGEST else -np.inf, high if high <= LARGEST else np.inf, nan)


def _by_octaves(node: Node, nodes: Nodes) -> Limits | None:
    """The limits of x times what a table holds for it, octave by octave: where x is large that may be small."""
    x, table = node.arguments
    if x not in nodes or table not in nodes or not nodes[table].table:
        return None
    low, high, nan = limits(x, nodes)
    if nan or low < 0 or high > 1:
        return None
    ends = [low, *(y for k in range(40, -1, -1) if low < (y := 2.0**-k) < high), high]
    products = []
    for octave in itertools.pairwise(ends):
        inside = Nodes(nodes.items())
        inside.limits[x] = Limits(*octave)
        factors = limits(table, inside)
        products += [a * b for a in octave for b in factors[:2]]
    return Limits(min(products), max(products))


def _is_nan(x: str, y: str, nodes: Nodes) -> bool:
    """Whether x says if y is NaN."""
    return x in nodes and nodes[x].operation == "ne" and nodes[x].arguments == (y, y)


def is_bfloat16(x: str, nodes: Nodes) -> bool:
    """Whether a float is certainly a bfloat16: the lower half of its bits is 0 (of a NaN's, whatever it is)."""
    if is_float(x):
        return int(x[1:]) % 2**16 == 0
    if x not in nodes:
        return False
    node = nodes[x]
    if node.operation in ("larger_than", "smaller_than"):
        return all(is_bfloat16(y, nodes) for y in node.arguments)
    if node.operation == "select_n":
        condition, no, yes = node.arguments
        finite = nodes.get(condition)
        # What is not finite is infinite or NaN; of a NaN that is a result the upper half is one, too.
        tested = finite is not None and (finite.operation, finite.arguments) == ("is_finite", (no,))
        ends = tested and no in nodes and nodes[no].operation in ARITHMETIC
        return (ends or is_bfloat16(no, nodes)) and is_bfloat16(yes, nodes)
    if node.operation == "bitcast_convert_type" and node.arguments[0] in nodes:
        source = nodes[node.arguments[0]]
        return source.operation == "and" and str(~0xFFFF) in source.arguments
    return False


ARITHMETIC = ("add", "sub", "mul", "div", "sqrt")


def _monotone(operation: Callable[[Any, Any], Any]) -> Callable[..., Limits]:
    """The limits of what grows or falls with each of one or two numbers."""

    def limited(*given: Limits) -> Limits:
        if any(x.nan or not np.isfinite(x[:2]).all() for x in given):
            return ANYTHING
        ends = [operation(*corner) for corner in itertools.product(*(x[:2] for x in given))]
        return Limits(min(ends), max(ends))

    return limited


def _bits_of(x: Limits) -> Limits:
    """As an integer: the bits of a float above 0."""
    if not 0 < x.low <= x.high < np.inf or x.nan:
        return ANYTHING
    low, high = (int(np.float32(end).view(np.int32)) for end in x[:2])
    return Limits(low, high)


def _float_of(x: Limits) -> Limits:
    if not 0 < x.low <= x.high < EXPONENT:
        return ANYTHING
    low, high = (float(np.int32(end).view(np.float32)) for end in x[:2])
    return Limits(low, high)


def _masked(x: Limits, mask: Limits) -> Limits:
    if x.low < 0 or x.high == np.inf or mask[:2] != (EXPONENT, EXPONENT):
        return ANYTHING
    return Limits(int(x.low) & EXPONENT, int(x.high) & EXPONENT)


def _root(x: float) -> float:
    """As a float32 is rounded."""
    return float(np.sqrt(np.float32(max(x, 0.0))))


LIMITED: dict[str, Callable[..., Limits]] = {
    "convert_element_type": lambda x: x,
    "abs": lambda x: Limits(max(x.low, -x.high, 0.0), max(-x.low, x.high), x.nan),
    "max": lambda x, y: Limits(max(x.low, y.low), max(x.high, y.high), x.nan or y.nan),
    "min": lambda x, y: Limits(min(x.low, y.low), min(x.high, y.high), x.nan or y.nan),
    "sqrt": lambda x: Limits(_root(x.low), _root(x.high), x.nan or x.low < 0),
    "sqrt_of_normal": lambda x: Limits(_root(x.low), _root(x.high)),
    "add": _monotone(operator.add), "sub": _monotone(operator.sub), "mul": _monotone(operator.mul),
    "shift_right_arithmetic": _monotone(lambda x, y: int(x) >> int(y)),
    "half_product": _monotone(lambda x, y: int(x) * int(y) >> 16),
    "bits of": _bits_of, "float of": _float_of, "and": _masked,
}  # fmt: skip
