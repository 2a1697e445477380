"""From a program to what is printed: constants in place, nothing twice, tables for functions of few numbers."""

import math
from typing import Any

import numpy as np

from adamite.engines.native.nodes import Few, Node, Nodes, bits, is_bfloat16, is_float, is_integer, limits, value
from adamite.engines.native.program import Program


def lower(program: Program, few: int = 8) -> tuple[Nodes, list[str]]:
    """The operations in order, by name, and the values of the program's outputs.

    Args:
        program: the program.
        few: integers of so many values, or fewer, may be the index of a table; if it is more than 8, so may bytes.
    """
    same: dict[str, str] = {}
    nodes = Nodes(few=few)
    seen: dict[tuple[object, ...], str] = {}
    for eqn in program.equations:
        arguments = tuple(same.get(a, a) for a in eqn.arguments)
        types = _types(program, eqn.arguments, eqn.operation, eqn.dtype)
        plain = Node(eqn.name, eqn.kind, eqn.dtype, eqn.operation, arguments, types)
        for node in _faster(plain, nodes):
            node = node._replace(arguments=tuple(same.get(a, a) for a in node.arguments))
            if (back := _already_there(node, nodes)) is not None:
                same[node.name] = back
                continue
            key = node[1:]
            if key in seen:
                same[node.name] = seen[key]
            else:
                seen[key] = node.name
                nodes[node.name] = node
    outputs = [same.get(x.value, x.value) for x in program.outputs]
    for x, name in zip(program.outputs, outputs, strict=True):
        if x.dtype == "bfloat16" and name in nodes and nodes[name].operation == "is already":
            _keep_lower_half(name, nodes, outputs)
    needed = set(outputs)
    for node in reversed(list(nodes.values())):
        if node.name in needed:
            needed.update(node.arguments)
    return Nodes((name, node) for name, node in nodes.items() if name in needed), outputs


def _types(program: Program, arguments: tuple[str, ...], operation: str, dtype: str) -> tuple[str, ...]:
    """The dtypes of arguments; an integer that is written has that of the others."""
    known = [program.dtypes.get(a) for a in arguments]
    others = [t for k, t in enumerate(known) if t and not (operation == "select_n" and k == 0)]
    return tuple(t or (others[0] if others else dtype) for t in known)


def _already_there(node: Node, nodes: Nodes) -> str | None:
    """What a result certainly is already.

    The bits of the bits of that; ``where(is_finite(x), x, 2 x)``, for nothing is fused; a number limited to what it is
    within.
    """
    if node.operation == "select_n":
        test, double = (nodes.get(a) for a in node.arguments[:2])
        x = node.arguments[2]
        finite = test is not None and (test.operation, test.arguments) == ("is_finite", (x,))
        twice = double is not None and double.operation == "mul" and set(double.arguments) == {bits(2.0), x}
        return x if finite and twice else None
    if node.operation in ("larger_than", "smaller_or"):
        k, x = node.arguments if node.operation == "larger_than" else node.arguments[::-1]
        low, high, nan = limits(x, nodes)
        return x if not nan and (low >= value(k) if node.operation == "larger_than" else high <= value(k)) else None
    if node.operation != "bitcast_convert_type":
        return None
    inner = nodes.get(node.arguments[0])
    back = inner is not None and inner.operation == node.operation and inner.types[0] == node.dtype
    return inner.arguments[0] if inner is not None and back else None


def _faster(node: Node, nodes: Nodes) -> list[Node]:
    """Faster operations in its place, the last of its name."""
    x, y, *_ = (*node.arguments, "", "")
    if node.operation in ("max", "min") and node.dtype == "float32":
        for k in (0, 1):
            if is_float(node.arguments[k]) and value(node.arguments[k]) != 0:
                name = {"max": "larger_than", "min": "smaller_than"}[node.operation]
                return [node._replace(operation=name, arguments=(node.arguments[k], node.arguments[1 - k]))]
    if node.operation == "div" and node.dtype == "float32":
        if is_float(y) and _is_power(value(y)):  # a number and its product with the inverse round the same
            return [node._replace(operation="mul", arguments=(x, bits(1 / value(y))))]
        if node.kind == "element" and (y.startswith("$") or (y in nodes and nodes[y].kind == "scalar")):
            # As XLA's simplifier: by one number for all elements it divides once.
            inverse = Node(node.name + "i", "scalar", "float32", "div", (bits(1.0), y), ("float32", "float32"))
            return [inverse, node._replace(operation="mul", arguments=(x, inverse.name))]
        if y in nodes and _power_of_two(y, nodes):
            inverse = Node(node.name + "i", nodes[y].kind, "float32", "inverse_power", (y,), ("float32",))
            return [inverse, node._replace(operation="mul", arguments=(x, inverse.name))]
    if node.operation == "sqrt" and node.dtype == "float32":
        low, high, nan = limits(x, nodes)
        if not nan and low >= 2.0**-100 and high <= 2.0**100:
            return [node._replace(operation="sqrt_of_normal")]
    if node.operation == "convert_element_type" and node.dtype == "bfloat16" and is_bfloat16(x, nodes):
        return [node._replace(operation="is already")]
    if node.operation == "convert_element_type" and (node.dtype, *node.types) == ("int32", "float32"):
        low, high, nan = limits(x, nodes)
        if not nan and low >= -(2**31) and high < 2**31:
            return [node._replace(operation="truncate")]
    if node.operation == "select_n" and node.kind == "element":
        found = _smaller_or(node, nodes)
        if found:
            return found
    if node.operation == "shift_right_arithmetic" and y == "16" and (product := _half_product(x, nodes)):
        return [node._replace(operation="half_product", arguments=product)]
    if node.operation == "shift_right_logical" and (kept := _kept(x, y, nodes)):
        return [node._replace(arguments=(kept, y))]
    if node.operation == "add" and node.dtype == "uint32" and (element := _in_a_block(node, nodes)):
        first = Node(node.name + "b", "block", "uint32", "add", ("@base", y), node.types)
        return [first, node._replace(arguments=(first.name, element))]
    if node.operation == "reduce_max" and (magnitudes := _magnitudes(x, nodes)):
        return [node._replace(operation="reduce_magnitude", arguments=(magnitudes,))]
    if node.operation in COMPUTED and node.kind == "element" and node.dtype in ("float32", "int32"):
        return [_function_of_few(node, nodes) or node]
    return [node]


UPPER_FROM_UPPER = {
    "is already": (0,), "bitcast_convert_type": (0,), "select_n": (1, 2), "larger_than": (1,), "smaller_than": (1,),
}  # fmt: skip
"""Arguments of which only the upper half decides on the upper half of the result."""


def _keep_lower_half(name: str, nodes: Nodes, outputs: list[str]) -> None:
    """Take away what clears the lower half of a float of which the upper half is stored."""
    node = nodes[name]
    for k in UPPER_FROM_UPPER.get(node.operation, ()):
        x = node.arguments[k]
        used = sum(other.arguments.count(x) for other in nodes.values()) + outputs.count(x)
        if x not in nodes or used > 1:
            continue
        if nodes[x].operation == "and" and nodes[x].arguments[1] == str(~0xFFFF):
            x = nodes[x].arguments[0]
            node = nodes[name] = node._replace(arguments=(*node.arguments[:k], x, *node.arguments[k + 1 :]))
        else:
            _keep_lower_half(x, nodes, outputs)


def _smaller_or(node: Node, nodes: Nodes) -> list[Node]:
    """``where(x < c, x, c)``: for NaN it is c."""
    condition, no, yes = node.arguments
    test = nodes.get(condition)
    if test is None or test.operation != "lt" or test.arguments != (yes, no) or not is_float(no):
        return []
    return [node._replace(operation="smaller_or", arguments=(yes, no), types=("float32", "float32"))]


def _half_product(x: str, nodes: Nodes) -> tuple[str, ...] | None:
    """The factors of a product of 32 bits whose upper half is wanted, if they are whole numbers of 16 bits."""
    node = nodes.get(x)
    if node is None or node.operation != "mul" or not is_integer(node.arguments[1]):
        return None
    y, factor = node.arguments[0], int(node.arguments[1])
    low, high, _ = limits(y, nodes)
    fits = low >= 0 and high < 2**16 and 0 <= factor < 2**16 and high * factor < 2**31
    return node.arguments if fits else None


def _kept(x: str, count: str, nodes: Nodes) -> str | None:
    """``y`` for ``y ^ (y >> n)``, of which a shift leaves only bits that are y's."""
    node = nodes.get(x)
    if node is None or node.operation != "xor" or not is_integer(count):
        return None
    y, shifted = node.arguments
    inner = nodes.get(shifted)
    if inner is None or inner.operation != "shift_right_logical" or inner.arguments[0] != y:
        return None
    return y if is_integer(inner.arguments[1]) and int(inner.arguments[1]) + int(count) >= 32 else None


def _in_a_block(node: Node, nodes: Nodes) -> str | None:
    """``e`` for ``(base + e) + y``, where y is one number for the whole block: base + y is, too."""
    place, other = (nodes.get(a) for a in node.arguments)
    if node.kind != "element" or place is None or place.operation != "add" or other is None or other.kind == "element":
        return None
    return place.arguments[1] if place.arguments[0] == "@base" else None


def _magnitudes(x: str, nodes: Nodes) -> str | None:
    """``y`` for ``where(y is NaN, infinity, |y|)``."""
    node = nodes.get(x)
    if node is None or node.operation != "select_n":
        return None
    test, size = (nodes.get(a) for a in node.arguments[:2])
    if test is None or size is None or test.operation != "ne" or size.operation != "abs":
        return None
    y = size.arguments[0]
    return y if test.arguments == (y, y) and node.arguments[2] == bits(np.inf) else None


def _function_of_few(node: Node, nodes: Nodes) -> Node | None:
    """A table of what the node is, if it depends on one integer of few values alone, by more than two operations."""
    few = _computed(node, nodes)
    if few is None or few.of == "" or few.operations <= 2:
        return None
    if node.dtype == "int32" and np.abs(few.values).max() >= 2**31:
        return None
    table = tuple(bits(x) if node.dtype == "float32" else str(int(x)) for x in few.values)
    return node._replace(operation="table", arguments=(few.of,), types=(few.dtype,), table=table)


COMPUTED = {
    "ge": np.greater_equal, "gt": np.greater, "le": np.less_equal, "lt": np.less, "eq": np.equal, "ne": np.not_equal,
    "and": np.bitwise_and, "add": np.add, "sub": np.subtract, "mul": np.multiply,
    "shift_left": np.left_shift, "shift_right_arithmetic": np.right_shift, "half_product": lambda x, y: (x * y) >> 16,
    "select_n": lambda condition, no, yes: np.where(condition, yes, no),
    "convert_element_type": None, "bitcast_convert_type": None,
}  # fmt: skip
"""Operations, as NumPy does them on float32 and int64; None: it depends on the dtypes."""


def _values(x: str, dtype: str, nodes: Nodes) -> Few | None:
    """The values of what depends on one integer of few values alone."""
    if _is_number(x):
        return Few("", "", np.atleast_1d(value(x)), 0)
    if x in nodes:
        if x not in nodes.values_of_few:
            nodes.values_of_few[x] = _values_of_node(nodes[x], nodes)
        return nodes.values_of_few[x]
    if dtype in ("int8", "uint8") and nodes.few > 8:
        return Few(x, dtype, np.arange(256).astype(np.uint8).view(dtype).astype(np.int64), 0)
    return None


def _values_of_node(node: Node, nodes: Nodes) -> Few | None:
    if node.operation == "table":
        return Few(node.arguments[0], node.types[0], np.array([value(y) for y in node.table]), 3)
    if (found := _computed(node, nodes)) is not None:
        return found
    low, high, _ = limits(node.name, nodes)
    whole = node.dtype == "int32" and node.kind == "element"
    return Few(node.name, "int32", np.arange(int(high) + 1), 0) if whole and 0 <= low <= high < nodes.few else None


def _computed(node: Node, nodes: Nodes) -> Few | None:
    """The same of an operation, from its arguments'."""
    if node.operation not in COMPUTED or node.dtype not in ("float32", "int32", "bool"):
        return None
    found = [_values(y, t, nodes) for y, t in zip(node.arguments, node.types, strict=True)]
    of = {(few.of, few.dtype) for few in found if few is not None and few.of}
    if None in found or len(of) > 1:
        return None
    values = [few.values for few in found if few is not None]
    operations = 1 + sum(few.operations for few in found if few is not None)
    return Few(*(next(iter(of), ("", ""))), _by_numpy(node, values), operations)


def _by_numpy(node: Node, values: list[np.ndarray]) -> np.ndarray:
    if (operation := COMPUTED[node.operation]) is not None:
        return operation(*values)
    if node.operation == "convert_element_type":
        return values[0].astype(np.float32 if node.dtype == "float32" else np.int64)
    if node.dtype == "float32":
        return values[0].astype(np.int32).view(np.float32)
    return values[0].astype(np.float32).view(np.int32).astype(np.int64)


def _power_of_two(x: str, nodes: Nodes) -> bool:
    """Whether a value is certainly infinite or a power of two, of which the inverse is one, too."""
    node = nodes[x]
    if node.operation == "larger_than":
        k, rest = node.arguments
        return _is_power(value(k)) and value(k) >= 2.0**-120 and rest in nodes and _masked(rest, nodes)
    if node.operation == "mul":
        y, k = node.arguments
        return (
            is_float(k) and 2.0**-8 <= value(k) <= 1 and _is_power(value(k)) and y in nodes and _power_of_two(y, nodes)
        )
    return False


def _masked(x: str, nodes: Nodes) -> bool:
    """Whether a value is a float of which only the exponent is left, times a power of two."""
    node = nodes[x]
    if node.operation == "mul":
        y, k = node.arguments
        return is_float(k) and 2.0**-30 <= value(k) <= 1 and _is_power(value(k)) and y in nodes and _masked(y, nodes)
    if node.operation != "bitcast_convert_type" or node.arguments[0] not in nodes:
        return False
    source = nodes[node.arguments[0]]
    return source.operation == "and" and source.arguments[1] == str(0x7F800000)


def _is_number(x: str) -> bool:
    return is_float(x) or is_integer(x)


def _is_power(x: Any) -> bool:
    mantissa, exponent = math.frexp(x)
    return mantissa == 0.5 and abs(exponent) < 120
