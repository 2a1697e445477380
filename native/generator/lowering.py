"""From a program to what is printed: constants in place, nothing twice, tables for chains of selections."""

from typing import NamedTuple

import numpy as np

from adamite.kernels.writing import Program


class Node(NamedTuple):
    """An operation with its constants: an argument is also "#" and the bits of a float."""

    name: str
    kind: str
    dtype: str
    operation: str
    arguments: tuple[str, ...]
    types: tuple[str, ...]  # the arguments' dtypes
    table: tuple[str, ...] = ()


def lower(program: Program, fixed: dict[int, int]) -> tuple[dict[str, Node], list[str]]:
    """The operations in order, by name, and the values of the program's outputs."""
    same: dict[str, str] = {f"${k}": f"#{bits}" for k, bits in fixed.items()}
    nodes: dict[str, Node] = {}
    seen: dict[tuple[object, ...], str] = {}
    for eqn in program.equations:
        arguments = tuple(same.get(a, a) for a in eqn.arguments)
        types = _types(program, eqn.arguments, eqn.operation, eqn.dtype)
        plain = Node(eqn.name, eqn.kind, eqn.dtype, eqn.operation, arguments, types)
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
    return {name: node for name, node in nodes.items() if name in needed}, outputs


def _types(program: Program, arguments: tuple[str, ...], operation: str, dtype: str) -> tuple[str, ...]:
    """The dtypes of arguments; an integer that is written has that of the others."""
    known = [program.dtypes.get(a) for a in arguments]
    others = [t for k, t in enumerate(known) if t and not (operation == "select_n" and k == 0)]
    return tuple(t or (others[0] if others else dtype) for t in known)


def _faster(node: Node, nodes: dict[str, Node]) -> list[Node]:
    """Faster operations in its place, the last of its name."""
    x, y, *_ = (*node.arguments, "", "")
    if node.operation in ("max", "min") and node.dtype == "float32":
        for k in (0, 1):
            if _is_float(node.arguments[k]) and _value(node.arguments[k]) != 0:
                name = {"max": "larger_than", "min": "smaller_than"}[node.operation]
                return [node._replace(operation=name, arguments=(node.arguments[k], node.arguments[1 - k]))]
    if node.operation == "div" and node.dtype == "float32":
        if _is_float(y) and _is_power(_value(y)):  # a number and its product with the inverse round the same
            return [node._replace(operation="mul", arguments=(x, _bits(1 / _value(y))))]
        if node.kind == "element" and (y.startswith("$") or (y in nodes and nodes[y].kind == "scalar")):
            # As XLA's simplifier: by one number for all elements it divides once.
            inverse = Node(node.name + "i", "scalar", "float32", "div", (_bits(1.0), y), ("float32", "float32"))
            return [inverse, node._replace(operation="mul", arguments=(x, inverse.name))]
        if y in nodes and _power_of_two(y, nodes):
            inverse = Node(node.name + "i", nodes[y].kind, "float32", "inverse_power", (y,), ("float32",))
            return [inverse, node._replace(operation="mul", arguments=(x, inverse.name))]
    if node.operation == "select_n" and node.kind == "element":
        return [_function_of_few(node, nodes) or _table(node, nodes)]
    return [node]


def _function_of_few(node: Node, nodes: dict[str, Node]) -> Node | None:
    """A table of what the node is, if it depends on one integer alone, and that is certainly one of 0, ..., 7."""
    found = _values(node.name, nodes | {node.name: node})
    if found is None or found[0] == "":
        return None
    e, values = found
    table = tuple(_bits(x) if node.dtype == "float32" else str(int(x)) for x in values)
    return node._replace(operation="table inside", arguments=(e,), types=("int32",), table=table)


COMPUTED = {
    "ge": np.greater_equal, "gt": np.greater, "le": np.less_equal, "lt": np.less, "eq": np.equal, "ne": np.not_equal,
    "and": np.bitwise_and, "select_n": lambda condition, no, yes: np.where(condition, yes, no),
}  # fmt: skip


def _values(x: str, nodes: dict[str, Node]) -> tuple[str, np.ndarray] | None:
    """The integer that a value depends on and what it is for each of its values; "" for a constant."""
    if _is_number(x):
        return "", np.full(8, _value(x) if _is_float(x) else int(x))
    if x not in nodes:
        return None
    node = nodes[x]
    if node.table and node.operation == "table inside":
        table = [_value(y) if _is_float(y) else int(y) for y in node.table]
        return node.arguments[0], np.array((table + [table[-1]] * 8)[:8])
    low, high = _limits(x, nodes)
    if node.dtype == "int32" and low >= 0 and high <= 7:
        return x, np.arange(8)
    if node.operation not in COMPUTED:
        return None
    found = [_values(y, nodes) for y in node.arguments]
    on = {y[0] for y in found if y is not None} - {""}
    if None in found or len(on) > 1:
        return None
    return next(iter(on), ""), COMPUTED[node.operation](*(y[1] for y in found if y is not None))


def _power_of_two(x: str, nodes: dict[str, Node]) -> bool:
    """Whether a value is certainly infinite or a power of two, of which the inverse is one, too."""
    node = nodes[x]
    if node.operation == "larger_than":
        k, rest = node.arguments
        return _is_power(_value(k)) and _value(k) >= 2.0**-120 and rest in nodes and _masked(rest, nodes)
    if node.operation == "mul":
        y, k = node.arguments
        return (
            _is_float(k)
            and 2.0**-8 <= _value(k) <= 1
            and _is_power(_value(k))
            and y in nodes
            and _power_of_two(y, nodes)
        )
    return False


def _masked(x: str, nodes: dict[str, Node]) -> bool:
    """Whether a value is a float of which only the exponent is left, times a power of two."""
    node = nodes[x]
    if node.operation == "mul":
        y, k = node.arguments
        return _is_float(k) and 2.0**-30 <= _value(k) <= 1 and _is_power(_value(k)) and y in nodes and _masked(y, nodes)
    if node.operation != "bitcast_convert_type" or node.arguments[0] not in nodes:
        return False
    source = nodes[node.arguments[0]]
    return source.operation == "and" and source.arguments[1] == str(0x7F800000)


def _table(node: Node, nodes: dict[str, Node]) -> Node:
    """``where(e >= 3, c, where(e >= 2, b, ...))`` as a table of constants."""
    condition, no, yes = node.arguments
    test = nodes.get(condition)
    if test is None or test.operation != "ge" or not _is_number(yes):
        return node
    e, bound = test.arguments
    if not bound.isdigit() or not 1 <= int(bound) <= 7:
        return node
    if _is_number(no) and int(bound) == 1:
        table: tuple[str, ...] = (no, yes)
    elif no in nodes and nodes[no].table and nodes[no].arguments == (e,) and len(nodes[no].table) == int(bound):
        table = (*nodes[no].table, yes)
    else:
        return node
    low, high = _limits(e, nodes)
    inside = "inside" if low >= 0 and high < len(table) else "anywhere"
    return node._replace(operation=f"table {inside}", arguments=(e,), types=("int32",), table=table)


def _limits(x: str, nodes: dict[str, Node]) -> tuple[float, float]:
    """What an integer is at least and at most."""
    if x.lstrip("-").isdigit():
        return int(x), int(x)
    if x in nodes and nodes[x].operation == "convert_element_type" and nodes[x].types == ("bool",):
        return 0, 1
    if x in nodes and nodes[x].operation == "add":
        (a, b), (c, d) = (_limits(y, nodes) for y in nodes[x].arguments)
        return a + c, b + d
    return -np.inf, np.inf


def _is_number(x: str) -> bool:
    return x.startswith("#") or x.lstrip("-").isdigit()


def _is_float(x: str) -> bool:
    return x.startswith("#")


def _is_power(x: np.float32) -> bool:
    mantissa, exponent = np.frexp(x)
    return mantissa == 0.5 and abs(exponent) < 120


def _value(x: str) -> np.float32:
    return np.uint32(int(x[1:])).view(np.float32)


def _bits(x: float) -> str:
    return f"#{int(np.float32(x).view(np.uint32))}"
