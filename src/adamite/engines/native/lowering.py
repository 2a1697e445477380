"""From a program to what is printed: constants in place, nothing twice, tables for functions of few numbers."""

import math
from typing import Any

import numpy as np

from adamite.engines.native.nodes import Node, Nodes, bits, is_bfloat16, is_float, is_integer, limits, value
from adamite.engines.native.program import Program


def lower(program: Program) -> tuple[Nodes, list[str]]:
    """The operations in order, by name, and the values of the program's outputs."""
    same: dict[str, str] = {}
    nodes = Nodes()
    seen: dict[tuple[object, ...], str] = {}
    for eqn in program.equations:
        arguments = tuple(same.get(a, a) for a in eqn.arguments)
        types = _types(program, eqn.arguments, eqn.operation, eqn.dtype)
        plain = Node(eqn.name, eqn.kind, eqn.dtype, eqn.operation, arguments, types)
        if (back := _already_there(plain, nodes)) is not None:
            same[eqn.name] = back
            continue
        for node in _faster(plain, nodes):
            node = node._replace(arguments=tuple(same.get(a, a) for a in node.arguments))
            key = node[1:]
            if key in seen:
                same[node.name] = seen[key]
            else:
                seen[key] = node.name
                nodes[node.name] = node
    outputs = [same.get(x.value, x.value) for x in program.outputs]
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
    """What a result is, if it is the bits of the bits of that, or ``where(is_finite(x), x, 2 x)``: nothing is fused."""
    if node.operation == "select_n":
        test, double = (nodes.get(a) for a in node.arguments[:2])
        x = node.arguments[2]
        finite = test is not None and (test.operation, test.arguments) == ("is_finite", (x,))
        twice = double is not None and double.operation == "mul" and set(double.arguments) == {bits(2.0), x}
        return x if finite and twice else None
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
    if node.operation == "add" and node.dtype == "uint32" and (element := _in_a_block(x, y, nodes)):
        first = Node(node.name + "b", "block", "uint32", "add", ("@base", y), node.types)
        return [first, node._replace(arguments=(first.name, element))]
    if node.operation == "reduce_max" and (magnitudes := _magnitudes(x, nodes)):
        return [node._replace(operation="reduce_magnitude", arguments=(magnitudes,))]
    if node.operation in COMPUTED and node.kind == "element" and node.dtype in ("float32", "int32"):
        return [_function_of_few(node, nodes) or node]
    return [node]


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


def _in_a_block(x: str, y: str, nodes: Nodes) -> str | None:
    """``e`` for ``(base + e) + y``, where y is one number for the whole block: base + y is, too."""
    node, other = nodes.get(x), nodes.get(y)
    if node is None or node.operation != "add" or other is None or other.kind == "element":
        return None
    return node.arguments[1] if node.arguments[0] == "@base" else None


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
    """A table of what the node is, if it depends on one integer alone, and that is certainly one of 0, ..., 7."""
    found = _computed(node, nodes)
    if found is None or found[0] == "":
        return None
    e, values = found
    if np.abs(values).max() >= 2**31 and node.dtype == "int32":
        return None
    table = tuple(bits(x) if node.dtype == "float32" else str(int(x)) for x in values)
    return node._replace(operation="table", arguments=(e,), types=("int32",), table=table)


COMPUTED = {
    "ge": np.greater_equal, "gt": np.greater, "le": np.less_equal, "lt": np.less, "eq": np.equal, "ne": np.not_equal,
    "and": np.bitwise_and, "add": np.add, "sub": np.subtract, "mul": np.multiply,
    "shift_left": np.left_shift, "shift_right_arithmetic": np.right_shift,
    "select_n": lambda condition, no, yes: np.where(condition, yes, no),
    "convert_element_type": lambda x: x.astype(np.float32 if x.dtype.kind == "i" else np.int64),
    "bitcast_convert_type": lambda x: x.astype(np.int32).view(np.float32),
}  # fmt: skip


def _values(x: str, nodes: Nodes) -> tuple[str, np.ndarray] | None:
    """The integer that a value depends on and what it is for each of its values; "" for a constant."""
    if _is_number(x):
        return "", np.full(8, value(x))
    if x in nodes and x not in nodes.values_of_few:
        nodes.values_of_few[x] = _values_of_node(nodes[x], nodes)
    return nodes.values_of_few.get(x)


def _values_of_node(node: Node, nodes: Nodes) -> tuple[str, np.ndarray] | None:
    if node.operation == "table":
        table = [value(y) for y in node.table]
        return node.arguments[0], np.array((table + [table[-1]] * 8)[:8])
    low, high, _ = limits(node.name, nodes)
    if node.dtype == "int32" and low >= 0 and high <= 7:
        return node.name, np.arange(8)
    return _computed(node, nodes)


def _computed(node: Node, nodes: Nodes) -> tuple[str, np.ndarray] | None:
    """The same of an operation, from its arguments'."""
    if node.operation not in COMPUTED or (node.operation == "bitcast_convert_type" and node.types != ("int32",)):
        return None
    found = [_values(y, nodes) for y in node.arguments]
    on = {y[0] for y in found if y is not None} - {""}
    if None in found or len(on) > 1:
        return None
    return next(iter(on), ""), COMPUTED[node.operation](*(y[1] for y in found if y is not None))


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
