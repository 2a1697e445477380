"""From a program to what is printed: constants in place, nothing twice, tables for chains of selections."""

from typing import NamedTuple

import numpy as np
from adamite.kernels.program import Program


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
        node = _simpler(Node(eqn.name, eqn.kind, eqn.dtype, eqn.operation, arguments, types), nodes)
        key = node[1:]
        if key in seen:
            same[eqn.name] = seen[key]
        else:
            seen[key] = eqn.name
            nodes[eqn.name] = node
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


def _simpler(node: Node, nodes: dict[str, Node]) -> Node:
    """The same with faster operations and the same results."""
    if node.operation in ("max", "min") and node.dtype == "float32":
        for k, x in enumerate(node.arguments):
            if x.startswith("#") and _value(x) != 0 and not np.isnan(_value(x)):
                name = {"max": "larger_than", "min": "smaller_than"}[node.operation]
                return node._replace(operation=name, arguments=(x, node.arguments[1 - k]))
    if node.operation == "div" and node.dtype == "float32" and node.arguments[1].startswith("#"):
        value = _value(node.arguments[1])
        mantissa, exponent = np.frexp(value)
        if abs(mantissa) == 0.5 and abs(exponent) < 100:  # a power of two: both round the same exact number
            inverse = int(np.float32(1 / value).view(np.uint32))
            return node._replace(operation="mul", arguments=(node.arguments[0], f"#{inverse}"))
    if node.operation == "select_n" and node.kind == "element":
        return _table(node, nodes)
    return node


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
    return node._replace(operation="table", arguments=(e,), types=("int32",), table=table)


def _is_number(x: str) -> bool:
    return x.startswith("#") or x.lstrip("-").isdigit()


def _value(x: str) -> np.float32:
    return np.uint32(int(x[1:])).view(np.float32)
