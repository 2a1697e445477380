"""Functions of an integer of few values, looked up in tables in the memory that a CTA shares.

Two functions of one integer stand side by side and are read together.
"""

from collections.abc import Iterator

from adamite.engines.native.cuda_expressions import c_type
from adamite.engines.native.nodes import Node, Nodes

ENTRIES = {1: "U1", 2: "U2"}
"""The type of an entry of so many words."""


class Tables:
    """Those of a program."""

    def __init__(self, nodes: Nodes) -> None:
        """Of the program with these operations."""
        self.tables: dict[str, list[Node]] = {}
        count: dict[str, int] = {}
        for node in nodes.values():
            if node.operation == "table":
                of = node.arguments[0]
                k = count[of] = count.get(of, -1) + 1
                self.tables.setdefault(f"{of}_{k // 2}", []).append(node)
        self.places = {n.name: (table, k) for table, own in self.tables.items() for k, n in enumerate(own)}

    def constants(self) -> Iterator[str]:
        """The tables in the GPU's memory."""
        for table, functions in self.tables.items():
            rows = zip(*map(_words, functions), strict=True)
            entries = [f"{{{', '.join(words)}}}" for words in rows]
            yield f"__device__ const {ENTRIES[len(functions)]} from_{table}[{len(entries)}] = {{{', '.join(entries)}}};"

    def shared(self) -> Iterator[str]:
        """Each CTA's copies of them."""
        for table, functions in self.tables.items():
            entry, length = ENTRIES[len(functions)], len(functions[0].table)
            yield f"  SHARED_TABLE({entry}, {length}, table_{table}, from_{table})"
        if self.tables:
            yield "  __syncthreads();"

    def look_up(self, node: Node) -> str:
        """The value of a function."""
        table, k = self.places[node.name]
        index = node.arguments[0] if node.types[0] == "int32" else f"(unsigned char){node.arguments[0]}"
        word = f"table_{table}[{index}].{'xy'[k]}"
        return f"__uint_as_float({word})" if c_type(node.dtype) == "float" else f"(int){word}"


def _words(node: Node) -> list[str]:
    """A table as words."""
    return [f"{x[1:] if x.startswith('#') else int(x) % 2**32}u" for x in node.table]
