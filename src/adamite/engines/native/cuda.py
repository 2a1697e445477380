"""A program as CUDA C++: one kernel for any number of leaves, a warp for each block of 256 elements.

A lane has 8 elements of a block. It loads all of its arrays, by vectors where the block is whole; goes through its
elements once in each phase, unrolled; between phases the warp agrees on the largest magnitude; and stores. So each
element is read and written by one lane, and no lane waits for memory more than once in a block.

The text is the same for all leaves, and for all settings of an optimizer: these are operands. What `cuda.cuh` defines
stands before it.
"""

import pathlib
from collections.abc import Iterator

from adamite.engines.native.cuda_expressions import SIZES, c_type, expression
from adamite.engines.native.cuda_tables import Tables
from adamite.engines.native.lowering import lower
from adamite.engines.native.nodes import Node
from adamite.engines.native.phases import depends_on_place, phases, reduces
from adamite.engines.native.program import BLOCK, Input, Program, UnsupportedError

PRELUDE = pathlib.Path(__file__).with_name("cuda.cuh")
"""What stands before every kernel."""
WARPS = 8
"""Of a CTA."""
TURNS = 4
"""Blocks that a warp steps, one after the other."""
CTAS = 3
"""That a multiprocessor holds at once, at least: the compiler then has registers enough, and puts none into memory."""
NAME = "adamite_step"
"""Of the kernel."""
RAW = {4: "unsigned", 2: "unsigned short", 1: "unsigned char"}


def slots(program: Program) -> list[int]:
    """The places of a leaf's arrays in the order in which a kernel has them: those of inputs, then those of others."""
    return sorted({x.place for x in (*program.inputs, *program.outputs)})


_sources: dict[str, str] = {}


def source(program: Program) -> str:
    """The kernel of a program, printed once.

    Raises:
        UnsupportedError: the program does something that no kernel does.
    """
    if program.block != BLOCK:
        raise UnsupportedError(f"its blocks have {program.block} elements, and kernels are for {BLOCK}")
    if program.name not in _sources:
        _sources[program.name] = "\n".join(_Printer(program).lines())
    return _sources[program.name]


class _Printer:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.nodes, self.values = lower(program, few=32)
        self.packed = self.take_last_rounding()
        self.slots = slots(program)
        elements = [x for x in (*program.inputs, *program.outputs) if x.kind == "element"]
        self.run = 8 if max(SIZES[x.dtype] for x in elements) <= 2 else 4
        self.phase = phases(self.nodes, self.values)
        self.reductions = [node for node in self.nodes.values() if reduces(node)]
        if unknown := {node.operation for node in self.reductions} - {"reduce_magnitude"}:
            raise UnsupportedError(f"no kernel does {', '.join(sorted(unknown))}")
        self.tables = Tables(self.nodes)
        self.carried = self.find_carried()

    def take_last_rounding(self) -> set[int]:
        """The outputs of 16 bits that are rounded two at a time, where they are stored: takes the rounding away."""
        packed = set()
        for k, (x, name) in enumerate(zip(self.program.outputs, self.values, strict=True)):
            node = self.nodes.get(name)
            if node is None or x.dtype not in ("bfloat16", "float16") or self.values.count(name) > 1:
                continue
            rounds = node.operation == "convert_element_type" and node.types == ("float32",)
            if rounds and not any(name in other.arguments for other in self.nodes.values()):
                self.values[k] = node.arguments[0]
                del self.nodes[name]
                packed.add(k)
        return packed

    def find_carried(self) -> set[str]:
        """Values of elements that a later phase needs, or a reduction."""
        carried = set()
        for node in self.nodes.values():
            elements = [a for a in node.arguments if a in self.nodes and self.nodes[a].kind == "element"]
            carried.update(a for a in elements if reduces(node) or self.phase[a] < self.phase[node.name])
        return carried

    def lines(self) -> Iterator[str]:
        """The text."""
        program, nodes = self.program, self.nodes.values()
        yield f"#define ARRAYS {len(self.slots)}\n#define RUN {self.run}\n#define WARPS {WARPS}\n#define TURNS {TURNS}"
        yield PRELUDE.read_text()
        yield from self.tables.constants()
        yield f'extern "C" __global__ void __launch_bounds__(32 * WARPS, {CTAS}) {NAME}(PARAMETER(Table) table) {{'
        yield "  const unsigned cta = blockIdx.x, lane = threadIdx.x & 31, warp = threadIdx.x >> 5;"
        yield "  const Leaf& leaf = leaf_of(table, cta);"
        yield "  [[maybe_unused]] const unsigned number = leaf.number;"
        yield "  const unsigned in_row = (unsigned)((leaf.columns + 255) >> 8), blocks = (unsigned)leaf.rows * in_row;"
        for k, dtype in enumerate(program.scalars):
            word = f"table.words[{k}]"
            kind = c_type(dtype)
            yield f"  [[maybe_unused]] const {kind} s{k} = {f'__uint_as_float({word})' if kind == 'float' else word};"
        yield from self.tables.shared()
        moving = depends_on_place(self.nodes)
        yield from ("  " + self.define(n) for n in nodes if n.kind == "scalar" and n.name not in moving)
        yield "#pragma unroll 1"
        yield "  for (int turn = 0; turn < TURNS; ++turn) {"
        yield "    const unsigned block = ((cta - leaf.first) * TURNS + turn) * WARPS + warp;"
        yield "    if (block >= blocks) break;"
        yield "    const Block at = locate(leaf, table.words, block, in_row);"
        yield "    [[maybe_unused]] const unsigned base = at.base;"
        yield from ("    " + self.define(n) for n in nodes if n.name in moving)
        yield from self.loads()
        yield from (f"    {c_type(n.dtype)} c_{n.name}[EACH];" for n in nodes if n.name in self.carried)
        for phase in range(1 + max(self.phase.values(), default=0)):
            for n in nodes:
                if n.kind == "block" and self.phase[n.name] == phase and not reduces(n):
                    yield "    " + self.define(n)
            yield from self.loop(phase)
        yield from self.stores()
        yield "  }\n}\n"

    def array(self, x: Input) -> str:
        """The first byte of an array of the leaf."""
        return f"(char*)leaf.array[{self.slots.index(x.place)}]"

    def loads(self) -> Iterator[str]:
        """All that a lane reads."""
        arrays = [(k, x, SIZES[x.dtype]) for k, x in enumerate(self.program.inputs) if x.kind == "element"]
        for k, _, size in arrays:
            yield f"    Words<{self.words(size)}> w{k}[EACH / RUN];"
        yield "    if (at.full) {"
        for k, x, size in arrays:
            yield f"      const char* p{k} = {self.array(x)} + (at.element + lane * RUN) * {size};"
            yield "#pragma unroll"
            load = f"load<{self.words(size)}>(p{k} + t * (32 * RUN * {size}))"
            yield f"      for (int t = 0; t < EACH / RUN; ++t) w{k}[t] = {load};"
        yield "    } else {"
        yield "#pragma unroll"
        yield "      for (int t = 0; t < EACH / RUN; ++t) {"
        yield "        const int e = (t * 32 + lane) * RUN;"
        for k, x, size in arrays:
            place = f"{self.array(x)} + (at.element + e) * {size}"
            yield f"        w{k}[t] = load_some<{self.words(size)}, {RAW[size]}>({place}, at.valid - e);"
        yield "      }"
        yield "    }"
        for k, x in enumerate(self.program.inputs):
            if x.kind == "block":
                yield f"    const {c_type(x.dtype)} i{k} = ((const {c_type(x.dtype)}*)({self.array(x)}))[block];"

    def words(self, size: int) -> int:
        """The words of a run of elements of so many bytes."""
        return self.run * size // 4

    def element(self, k: int, x: Input) -> str:
        """The element j of an array that was loaded."""
        size = SIZES[x.dtype]
        word, shift = f"w{k}[j / RUN].w[j % RUN * {size} / 4]", f"(j * {8 * size} % 32)"
        return {
            "float32": f"__uint_as_float({word})", "int32": f"(int){word}", "uint32": word,
            "bfloat16": f"__uint_as_float(j % 2 ? {word} & 0xFFFF0000u : {word} << 16)",
            "float16": f"from_f16({word} >> {shift} & 0xFFFFu)",
            "int16": f"(int)(short)({word} >> {shift})", "uint16": f"(int)(unsigned short)({word} >> {shift})",
            "int8": f"(int)(signed char)({word} >> {shift})", "uint8": f"(int)(unsigned char)({word} >> {shift})",
        }[x.dtype]  # fmt: skip

    def loop(self, phase: int) -> Iterator[str]:
        """What is done to each element in a phase, then the reductions, then the stores."""
        work = [n for n in self.nodes.values() if n.kind == "element" and self.phase[n.name] == phase]
        reductions = [n for n in self.reductions if self.phase[n.name] == phase + 1]
        outputs = enumerate(zip(self.program.outputs, self.values, strict=True))
        stores = [(k, x) for k, (x, value) in outputs if x.kind == "element" and self.phase.get(value, 0) == phase]
        own = {n.name for n in work}
        used = {a for n in work for a in n.arguments} | {self.values[k] for k, _ in stores}
        yield from (f"    float r_{n.name} = 0;" for n in reductions)
        yield from (f"    {c_type(x.dtype)} o{k}[EACH];" for k, x in stores)
        yield "#pragma unroll"
        yield "    for (int j = 0; j < EACH; ++j) {"
        yield "      [[maybe_unused]] const unsigned i = (j / RUN * 32 + lane) * RUN + j % RUN;"
        for k, x in enumerate(self.program.inputs):
            if x.kind == "element" and f"i{k}" in used:
                yield f"      const {c_type(x.dtype)} i{k} = {self.element(k, x)};"
        for name in self.nodes:
            if name in used and name in self.carried and name not in own:
                yield f"      const {c_type(self.nodes[name].dtype)} {name} = c_{name}[j];"
        for n in work:
            yield "      " + self.define(n)
            if n.name in self.carried:
                yield f"      c_{n.name}[j] = {n.name};"
        for n in reductions:
            yield f"      r_{n.name} = larger(r_{n.name}, fabsf(c_{n.arguments[0]}[j]));"
        yield from (f"      o{k}[j] = {self.values[k]};" for k, _ in stores)
        yield "    }"
        if reductions:
            yield from self.reduce_ragged(reductions)
        for n in reductions:
            yield f"    const float {n.name} = largest_in_warp(r_{n.name});"
        for k, x in stores:
            yield from self.pack(k, x)

    def reduce_ragged(self, reductions: list[Node]) -> Iterator[str]:
        """The same of a block that is not whole: what is not there does not count."""
        yield "    if (at.valid < 256) {"
        yield from (f"      r_{n.name} = 0;" for n in reductions)
        yield "#pragma unroll"
        yield "      for (int j = 0; j < EACH; ++j) {"
        yield "        if ((int)((j / RUN * 32 + lane) * RUN + j % RUN) >= at.valid) continue;"
        for n in reductions:
            yield f"        r_{n.name} = larger(r_{n.name}, fabsf(c_{n.arguments[0]}[j]));"
        yield "      }"
        yield "    }"

    def pack(self, k: int, x: Input) -> Iterator[str]:
        """Put the elements of an output into words."""
        size = SIZES[x.dtype]
        count = self.words(size)

        def at(n: int) -> str:
            return f"o{k}[t * RUN + {4 // size} * k + {n}]" if size < 4 else f"o{k}[t * RUN + k]"

        parts = ", ".join(at(n) for n in range(4 // size))
        if size == 4:
            word = f"__float_as_uint({parts})" if x.dtype == "float32" else f"(unsigned){parts}"
        elif x.dtype == "bfloat16":
            word = f"pack_bf16({parts})" if k in self.packed else f"join_upper({parts})"
        else:
            word = f"pack_f16({parts})" if x.dtype == "float16" else f"join({parts})"
        yield f"    Words<{count}> q{k}[EACH / RUN];"
        yield "#pragma unroll"
        yield "    for (int t = 0; t < EACH / RUN; ++t) {"
        yield "#pragma unroll"
        yield f"      for (int k = 0; k < {count}; ++k) q{k}[t].w[k] = {word};"
        yield "    }"

    def stores(self) -> Iterator[str]:
        """Store all outputs. Those of which there is one for each block replace what all lanes have read before."""
        elements = [(k, x, SIZES[x.dtype]) for k, x in enumerate(self.program.outputs) if x.kind == "element"]
        yield "#pragma unroll"
        yield "    for (int t = 0; t < EACH / RUN; ++t) {"
        yield "      const int e = (t * 32 + lane) * RUN;"
        yield "      if (at.full) {"
        for k, x, size in elements:
            yield f"        store<{self.words(size)}>({self.array(x)} + (at.element + e) * {size}, q{k}[t].w);"
        yield "      } else {"
        for k, x, size in elements:
            place = f"{self.array(x)} + (at.element + e) * {size}"
            yield f"        store_some<{self.words(size)}, {RAW[size]}>({place}, q{k}[t].w, at.valid - e);"
        yield "      }"
        yield "    }"
        blocks = [(x, value) for x, value in zip(self.program.outputs, self.values, strict=True) if x.kind == "block"]
        if blocks:
            yield "    meet();"
        for x, value in blocks:
            yield f"    if (lane == 0) (({c_type(x.dtype)}*)({self.array(x)}))[block] = {value};"

    def define(self, node: Node) -> str:
        """The definition of a value."""
        value = self.tables.look_up(node) if node.operation == "table" else expression(node, self.nodes)
        return f"const {c_type(node.dtype)} {node.name} = {value};"
