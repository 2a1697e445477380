"""In which loop over the block each operation stands."""

from typing import NamedTuple

from adamite.kernels.program import Program
from lowering import Node


class Schedule(NamedTuple):
    """Loops are numbered from 0; the number of a block that ends loop k is known from loop k + 1 on."""

    count: int
    phase: dict[str, int]
    carried: list[str]  # values that a later loop needs, too, and that are kept in between
    stored: list[int | None]  # the loop in which each output of elements is written
    moves: dict[str, bool]  # whether a scalar depends on the block's place


def schedule(nodes: dict[str, Node], outputs: list[str], program: Program) -> Schedule:
    """As early as possible; later where that spares keeping a value."""
    phase: dict[str, int] = {}
    for node in nodes.values():
        phase[node.name] = max([phase.get(a, 0) for a in node.arguments], default=0) + node.operation.startswith("reduce")
    users: dict[str, list[Node]] = {name: [] for name in nodes}
    for node in nodes.values():
        for a in node.arguments:
            if a in users:
                users[a].append(node)
    for node in reversed(list(nodes.values())):
        if node.kind == "element" and node.name not in outputs:
            _sink(node, nodes, users, phase)

    stored: list[int | None] = []
    last_read = _last_reads(nodes, phase)
    places = {x.place: f"i{k}" for k, x in enumerate(program.inputs)}
    for x, value in zip(program.outputs, outputs, strict=True):
        # An output may lie where its input does: it is written when that has been read for the last time.
        stored.append(
            max(phase.get(value, 0), last_read.get(places.get(x.place, ""), 0)) if x.kind == "element" else None
        )
    carried = [
        name
        for name, node in nodes.items()
        if node.kind == "element"
        and (
            any(_at(user, phase) > phase[name] or user.operation.startswith("reduce") for user in users[name])
            or any(value == name and at is not None and at > phase[name] for value, at in zip(outputs, stored, strict=True))
        )
    ]
    moves: dict[str, bool] = {}
    for node in nodes.values():
        moves[node.name] = any(a == "@base" or moves.get(a, False) for a in node.arguments)
    count = 1 + max([*phase.values(), *(at for at in stored if at is not None)])
    return Schedule(count, phase, carried, stored, moves)


def _at(user: Node, phase: dict[str, int]) -> int:
    """The loop in which `user` reads its arguments."""
    return phase[user.name] - user.operation.startswith("reduce")


def _sink(node: Node, nodes: dict[str, Node], users: dict[str, list[Node]], phase: dict[str, int]) -> None:
    """Move an operation to its first user's loop, if no more than one value is then kept instead of it."""
    if not users[node.name]:
        return
    later = min(_at(user, phase) for user in users[node.name])
    if later <= phase[node.name]:
        return
    kept = [a for a in set(node.arguments) if a in nodes and nodes[a].kind == "element"]
    if len(kept) <= 1:
        phase[node.name] = later


def _last_reads(nodes: dict[str, Node], phase: dict[str, int]) -> dict[str, int]:
    last: dict[str, int] = {}
    for node in nodes.values():
        for a in node.arguments:
            if a.startswith("i"):
                last[a] = max(last.get(a, 0), _at(node, phase))
    return last
