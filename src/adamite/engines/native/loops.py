"""In which loop over the block each operation stands, on CPUs.

A phase is cut into several loops: into parts that share nothing but values that are kept anyway, and long parts where
few values cross the cut. A step is a long chain, each operation waiting for the one before it; the shorter a loop is,
the more of its turns a processor works at together. What crosses a cut is kept in the fastest cache.

But short parts stand in one loop, the weights above all: a division and a root take ten times as long as a sum, and in
that time a processor does what does not wait for them.
"""

from typing import NamedTuple

from adamite.engines.native.nodes import Nodes
from adamite.engines.native.phases import phases, reduces
from adamite.engines.native.program import Program

LONGEST = 32
"""Operations of a loop, about."""


class Loop(NamedTuple):
    """One loop over the block."""

    work: list[str]  # the operations, in order
    stores: list[int]  # the outputs that it writes
    reductions: list[str]  # of which it collects the elements
    phase: int


class Schedule(NamedTuple):
    """The loops, in order."""

    loops: list[Loop]
    phase: dict[str, int]  # of every operation
    carried: list[str]  # values that are kept for another loop


def schedule(nodes: Nodes, outputs: list[str], program: Program) -> Schedule:
    """The loops of a program."""
    phase = phases(nodes, outputs)
    kept = {
        a for n in nodes.values() for a in n.arguments
        if a in nodes and nodes[a].kind == "element" and (reduces(n) or phase[n.name] > phase[a])
    }  # fmt: skip
    loops: list[Loop] = []
    waiting: list[list[str]] = []
    for at in range(last := 1 + max(phase.values())):
        parts = waiting + _parts(at, nodes, phase, kept, outputs)
        waiting = [part for part in parts if at + 1 < last and not kept.intersection(part)]  # no other part needs them
        for part in _joined([part for part in parts if part not in waiting]):
            loops += [Loop(piece, [], [], at) for piece in _pieces(part, nodes)]
    loops = [loop for loop in loops if loop.work]
    where = {name: k for k, loop in enumerate(loops) for name in loop.work}

    places = {x.place: f"i{k}" for k, x in enumerate(program.inputs)}
    last_read = {
        a: k for k, loop in enumerate(loops) for name in loop.work for a in nodes[name].arguments if a[0] == "i"
    }
    for k, (x, value) in enumerate(zip(program.outputs, outputs, strict=True)):
        if x.kind == "element":
            # An output may lie where its input does: it is written when that has been read for the last time.
            loops[max(where.get(value, 0), last_read.get(places.get(x.place, ""), 0))].stores.append(k)
    for node in nodes.values():
        if reduces(node):
            loops[where[node.arguments[0]]].reductions.append(node.name)

    def leaves(name: str) -> bool:
        at = where[name]
        return (
            any(name in nodes[user].arguments for k, loop in enumerate(loops) if k != at for user in loop.work)
            or any(outputs[output] == name for k, loop in enumerate(loops) if k != at for output in loop.stores)
            or any(nodes[reduction].arguments == (name,) for reduction in loops[at].reductions)
        )

    return Schedule(loops, phase, [name for name in where if leaves(name)])


def _parts(at: int, nodes: Nodes, phase: dict[str, int], kept: set[str], outputs: list[str]) -> list[list[str]]:
    """The operations of a phase, apart where they share only what is kept; what keeps comes before what needs it."""
    goals = [n for n in nodes if nodes[n].kind == "element" and phase[n] == at and (n in kept or n in outputs)]
    parts: list[set[str]] = []
    for goal in goals:
        part = _cone(goal, nodes, phase, kept)
        parts, joined = [x for x in parts if not x & part], [x for x in parts if x & part]
        parts.append(part.union(*joined))
    ordered: list[set[str]] = []
    while parts:
        missing = set().union(*parts) & kept
        ready = [x for x in parts if not ({a for name in x for a in nodes[name].arguments} - x) & missing]
        ready = ready or [set().union(*parts)]  # they need each other
        ordered += ready
        parts = [x for x in parts if not any(x <= y for y in ready)]
    return [_depth_first(part, nodes) for part in ordered]


def _cone(goal: str, nodes: Nodes, phase: dict[str, int], kept: set[str]) -> set[str]:
    """The operations of a phase that lead to a value, from what is kept on."""
    found: set[str] = set()
    open_ = [goal]
    while open_:
        name = open_.pop()
        if name not in found and name in nodes and nodes[name].kind == "element" and phase[name] == phase[goal]:
            found.add(name)
            open_ += [a for a in nodes[name].arguments if a not in kept]
    return found


def _depth_first(part: set[str], nodes: Nodes) -> list[str]:
    """In an order in which values are used soon after they are computed."""
    order: dict[str, None] = {}

    def visit(name: str) -> None:
        if name in part and name not in order:
            for a in nodes[name].arguments:
                visit(a)
            order[name] = None

    for name in nodes:
        if name in part and not any(name in nodes[user].arguments for user in part):
            visit(name)
    return list(order)


def _joined(parts: list[list[str]]) -> list[list[str]]:
    """Neighbours together, where they are short."""
    joined: list[list[str]] = []
    for part in parts:
        if joined and len(joined[-1]) + len(part) <= LONGEST:
            joined[-1] = joined[-1] + part
        else:
            joined.append(part)
    return joined


def _pieces(part: list[str], nodes: Nodes) -> list[list[str]]:
    """Cut where the fewest values cross, so that no piece is much longer than the others."""
    count = round(len(part) / LONGEST)
    if count < 2:
        return [part]
    length = len(part) / count
    first, last = int(length * 0.7), int(length * 1.3)
    last_use = {a: k for k, name in enumerate(part) for a in nodes[name].arguments}
    crossing = {
        cut: sum(last_use.get(name, 0) >= cut for name in part[:cut]) for cut in range(first, min(last, len(part)))
    }
    cut = min(crossing, key=lambda k: (crossing[k], abs(k - length)))
    return [part[:cut], *_pieces(part[cut:], nodes)]
