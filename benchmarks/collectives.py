"""What the devices of a compiled XLA program send each other, counted from its text.

    from collectives import collectives
    found = collectives(jax.jit(step).lower(*args).compile().as_text())
    sum(one.sent for one in found)      # bytes that each device sends

A collective that the TPU compiler splits into a start and an end keeps its channel, and is counted once; an all-reduce
of which each device keeps its part is a reduce-scatter, and what the compiler's computation ``all-reduce-scatter`` is
called for. An instruction inside of a loop counts once.
"""

import re
from typing import NamedTuple

from hlo_bytes import ARRAY, size

KINDS = ("all-reduce", "reduce-scatter", "all-gather", "collective-permute", "all-to-all")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(")


class Collective(NamedTuple):
    """One exchange of a program."""

    kind: str
    size: int
    """Bytes of the whole array, of which devices give or get parts."""
    devices: int
    """How many of them exchange it."""

    @property
    def sent(self) -> float:
        """Bytes that each of them sends, in a ring."""
        if self.kind == "collective-permute":
            return self.size
        return (2 if self.kind == "all-reduce" else 1) * self.size * (self.devices - 1) / self.devices


def collectives(hlo: str) -> list[Collective]:
    """All of a program's, in the order of its text."""
    found: dict[str, Collective] = {}
    within = ""
    for line in hlo.splitlines():
        if head := _COMPUTATION.match(line):
            within = head[1]
        if not (instruction := _INSTRUCTION.search(line)):
            continue
        types, kind, start = instruction.groups()
        devices = _devices(line)
        count = max(map(size, _arrays(types))) if start else size(types)
        if kind == "all-reduce" and within.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"
        elif kind == "reduce-scatter":
            count *= devices
        channel = re.search(r"channel_id=(\d+)", line)
        found.setdefault(channel[1] if channel else line, Collective(kind, count, devices))
    return [*found.values()]


def _arrays(types: str) -> list[str]:
    return [found[0] for found in ARRAY.finditer(types)]


def _devices(line: str) -> int:
    """How many devices are in a group."""
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", line):
        sizes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        count = 1
        for name in re.findall(r"'(\w+)'", mesh[2]):
            count *= sizes[name]
        return count
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(iota[1])
    if groups := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return len(groups[1].split(","))
    return 1
