"""In which phase of a step each operation stands: a block that is reduced to a number is gone through again.

The number that a block is reduced to in phase k is known from phase k + 1 on.
"""

from adamite.engines.native.nodes import Node, Nodes


def phases(nodes: Nodes, outputs: list[str]) -> dict[str, int]:
    """The phase of every operation: as early as possible; later where that spares keeping a value."""
    phase: dict[str, int] = {}
    for node in nodes.values():
        phase[node.name] = max([phase.get(a, 0) for a in node.arguments], default=0) + reduces(node)
    _sink(nodes, outputs, phase)
    return phase


def depends_on_place(nodes: Nodes) -> set[str]:
    """The scalars that differ between the blocks of a leaf."""
    found: set[str] = set()
    for node in nodes.values():
        if node.kind == "scalar" and ("@base" in node.arguments or found.intersection(node.arguments)):
            found.add(node.name)
    return found


def reduces(node: Node) -> bool:
    """Whether an operation makes one number of a block."""
    return node.operation.startswith("reduce")


def _sink(nodes: Nodes, outputs: list[str], phase: dict[str, int]) -> None:
    """Move operations to their first user's phase, where no more than one value is then kept instead of the result."""
    free: set[str] = set()  # what depends on the elements' numbers alone
    for node in nodes.values():
        if all(a in free or not (a[0] == "i" or (a in nodes and nodes[a].kind == "element")) for a in node.arguments):
            free.add(node.name)
    for node in reversed(list(nodes.values())):
        users = [phase[n.name] - reduces(n) for n in nodes.values() if node.name in n.arguments]
        if node.kind != "element" or node.name in outputs or not users or min(users) <= phase[node.name]:
            continue
        kept = [a for a in set(node.arguments) if a in nodes and nodes[a].kind == "element" and a not in free]
        if len(kept) <= 1:
            phase[node.name] = min(users)
