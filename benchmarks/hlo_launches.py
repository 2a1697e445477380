"""Kernel launches of a compiled XLA program for a GPU, and the bytes that they move, counted from its text.

    from hlo_launches import launches
    found = launches(jax.jit(step, donate_argnums=(0, 1)).lower(*args).compile().as_text())
    sum(one.moved for one in found), sum(one.times for one in found)

There `compiled.cost_analysis()` is None. Every instruction that does something is one launch; of a loop's body, as many
as the loop has turns. A launch reads each of its distinct operands once and writes each of its results once, also where
a result lies in place of an operand, with these exceptions:

- Of an operand that a fusion only slices, the slices are read; of one that it only updates in place, nothing.
- Of a result that is an update in place, the update is written.
- Of a conditional, the branch that moves most counts.
"""

import re
from typing import NamedTuple

from hlo_bytes import size

_FREE = {
    "parameter", "tuple", "get-tuple-element", "bitcast", "constant", "after-all", "opt-barrier", "copy-done",
    "fusion-done", "async-done", "async-update",
}  # fmt: skip
_SEEN_THROUGH = ("bitcast", "reshape")


class Launch(NamedTuple):
    """What one instruction launches."""

    name: str
    operation: str
    times: int
    moved: int
    """Bytes read and written, all times together."""


class _Instruction(NamedTuple):
    name: str
    type: str
    operation: str
    operands: list[str]
    attributes: str
    is_root: bool

    def called(self, *keys: str) -> list[str]:
        """The computations that it calls, of the first of these attributes that it has."""
        for key in keys:
            if found := re.search(rf"\b{key}=(?:\{{([^}}]*)\}}|(%[\w.\-]+))", self.attributes):
                return re.findall(r"%([\w.\-]+)", found[1] or found[2])
        raise ValueError(f"%{self.name} calls nothing by {' or '.join(keys)}")


_Computations = dict[str, list[_Instruction]]


def launches(hlo: str) -> list[Launch]:
    """All of a program's, those that move most first."""
    computations, entry = _parsed(hlo)
    return sorted(_within(computations, entry, 1), key=lambda one: -one.moved)


def _parsed(hlo: str) -> tuple[_Computations, str]:
    """The instructions of each computation, and the name of that which is run."""
    computations: _Computations = {}
    entry, current = "", None
    for line in re.sub(r"/\*index=\d+\*/", "", hlo).splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            current = computations[head[2]] = []
            entry = head[2] if head[1] else entry
        elif current is not None and (one := _instruction(line)):
            current.append(one)
    return computations, entry


def _instruction(line: str) -> _Instruction | None:
    head = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
    if not head:
        return None
    rest = line[head.end() :]
    types, rest = _cut(rest) if rest.startswith("(") else rest.split(" ", 1)
    operation, rest = rest.strip().split("(", 1)
    operands, attributes = _cut("(" + rest)
    return _Instruction(
        head[2], types, operation, re.findall(r"%([\w.\-]+)", operands), attributes, head[1] is not None
    )


def _cut(text: str) -> tuple[str, str]:
    """What is in the parentheses that it begins with, and what follows these."""
    depth = 0
    for k, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return text[: k + 1], text[k + 1 :]
    raise ValueError(f"no parenthesis ends {text:.80}")


def _within(computations: _Computations, name: str, times: int) -> list[Launch]:
    """The launches of one computation that runs so often."""
    types = {x.name: x.type for x in computations[name]}
    found: list[Launch] = []
    for x in computations[name]:
        if x.operation == "while":
            turns = re.search(r'"known_trip_count":\{"n":"(\d+)"', x.attributes)
            if not turns:
                raise ValueError(f"how often the loop %{x.name} runs is not known")
            found += _within(computations, x.called("body")[0], times * int(turns[1]))
        elif x.operation == "conditional":
            names = x.called("branch_computations", "true_computation")
            names += [] if len(names) > 1 else x.called("false_computation")
            branches = [_within(computations, branch, times) for branch in names]
            found += max(branches, key=lambda branch: sum(one.moved for one in branch))
        elif x.operation == "call":
            found += _within(computations, x.called("to_apply")[0], times)
        elif x.operation not in _FREE:
            found.append(Launch(x.name, x.operation, times, times * _moved(computations, x, types)))
    return found


def _moved(computations: _Computations, x: _Instruction, types: dict[str, str]) -> int:
    """Bytes of one launch."""
    if x.operation in ("fusion", "fusion-start"):
        return _moved_by_fusion(computations[x.called("calls")[0]])
    if x.operation in ("dynamic-slice", "slice"):
        return 2 * size(x.type)
    if x.operation == "dynamic-update-slice":
        return 2 * size(types[x.operands[1]])
    if x.operation == "copy-start":
        return 2 * size(types[x.operands[0]])
    return size(x.type) + sum(size(types[name]) for name in dict.fromkeys(x.operands))


def _moved_by_fusion(fused: list[_Instruction]) -> int:
    by_name = {x.name: x for x in fused}
    users: dict[str, list[_Instruction]] = {}
    for x in fused:
        for name in dict.fromkeys(x.operands):
            users.setdefault(name, []).append(x)
    read = sum(_read(x, users) for x in fused if x.operation == "parameter")
    root = next(x for x in fused if x.is_root)
    results = [by_name[name] for name in root.operands] if root.operation == "tuple" else [root]
    return read + sum(_written(x, by_name) for x in results)


def _read(x: _Instruction, users: dict[str, list[_Instruction]]) -> int:
    """Bytes of a value that its users in a fusion read, at most all."""
    total = 0
    for user in users.get(x.name, []):
        is_first = user.operands[0] == x.name
        if user.operation in _SEEN_THROUGH:
            total += _read(user, users)
        elif user.operation in ("dynamic-slice", "slice") and is_first:
            total += size(user.type)
        elif user.operation != "dynamic-update-slice" or not is_first:
            return size(x.type)
    return min(total, size(x.type))


def _written(x: _Instruction, by_name: dict[str, _Instruction]) -> int:
    while x.operation in _SEEN_THROUGH:
        x = by_name[x.operands[0]]
    return size(by_name[x.operands[1]].type) if x.operation == "dynamic-update-slice" else size(x.type)
