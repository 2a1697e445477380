"""A program as C++: loops of straight lines over the vectors of a block."""

from collections.abc import Sequence

import numpy as np

from adamite.engines.native.loops import Loop, Schedule, schedule
from adamite.engines.native.lowering import lower
from adamite.engines.native.nodes import Node, Nodes
from adamite.engines.native.phases import depends_on_place
from adamite.engines.native.program import Program

TYPES = {
    "float32": ("f32", "F", "loadF", "storeF"),
    "bfloat16": ("bf16", "F", "loadBf16", "storeBf16"),
    "int32": ("i32", "I", "loadI", "storeI"),
    "uint32": ("u32", "U", "loadU", "storeU"),
    "int16": ("i16", "I", "loadI16", "storeI16"),
    "int8": ("i8", "I", "loadI8", "storeBytes"),
    "uint8": ("u8", "I", "loadU8", "storeBytes"),
    "bool": ("", "M", "loadI", "storeI"),
}
SIZES = {"float32": 4, "bfloat16": 2, "int32": 4, "uint32": 4, "int16": 2, "int8": 1, "uint8": 1}

PLAIN = {
    "add": "{0} + {1}", "sub": "{0} - {1}", "mul": "{0} * {1}", "div": "{0} / {1}", "neg": "-{0}",
    "and": "{0} & {1}", "or": "{0} | {1}", "xor": "{0} ^ {1}", "not": "~{0}",
    "shift_left": "{0} << {1}", "shift_right_logical": "({T})(asU({0}) >> asU({1}))",
    "shift_right_arithmetic": "({T})(asI({0}) >> asI({1}))",
    "eq": "(M)({0} == {1})", "ne": "(M)({0} != {1})", "lt": "(M)({0} < {1})", "le": "(M)({0} <= {1})",
    "gt": "(M)({0} > {1})", "ge": "(M)({0} >= {1})",
    "select_n": "choose({0}, {1}, {2})", "max": "larger({0}, {1})", "min": "smaller({0}, {1})",
    "larger_than": "larger_than({0}, {1})", "smaller_than": "smaller_than({0}, {1})",
    "abs": "absolute({0})", "sign": "sign({0})", "sqrt": "root({0})", "sqrt_of_normal": "root({0})",
    "rsqrt": "1.0f / root({0})",
    "floor": "down({0})", "ceil": "up({0})", "round:1": "even({0})", "is_finite": "is_finite({0})",
    "integer_pow:2": "{0} * {0}", "square": "{0} * {0}", "iota:0": "asU(from(i))",
    "inverse_power": "inverse_power({0})", "smaller_or": "smaller_or({0}, {1})", "truncate": "truncated({0})",
    "is already": "{0}", "half_product": "half_product({0}, {1})",
}  # fmt: skip
"""How an operation is written; T is the type of the result."""

INTEGERS = ("int32", "uint32", "int16", "int8", "uint8")


def print_kernel(program: Program, recipes: Sequence[str]) -> str:
    """The function ``KERNEL(name)`` of a program, which does these recipes' steps."""
    nodes, outputs = lower(program)
    plan, moving = schedule(nodes, outputs, program), depends_on_place(nodes)
    lines = [f"// {recipe}" for recipe in recipes]
    lines.append(f"// Operations on a vector of elements: {sum(map(_computes, nodes.values()))}")
    lines += [f"void KERNEL({program.name})(const Call& call) {{"]
    used = sorted({a for node in nodes.values() for a in node.arguments if a.startswith("$")}, key=lambda a: int(a[1:]))
    for operand in used:
        place = int(operand[1:])
        kind = TYPES[program.scalars[place]][1]
        lines.append(f"  const {kind} s{place} = as{kind}(splat(call.scalars[{place}]));")
    for node in nodes.values():
        if node.kind == "scalar" and node.name not in moving:
            lines.append("  " + _define(node, nodes))
    for name in plan.carried:
        lines.append(f"  alignas(64) char c_{name}[4 * kBlock];")
    lines.append("  for (int64_t b = 0; b < call.blocks; ++b) {")
    lines.append("    [[maybe_unused]] const uint32_t base = call.base + (uint32_t)b * kBlock;")
    for node in nodes.values():
        if node.name in moving:
            lines.append("    " + _define(node, nodes))
    for k, x in enumerate(program.inputs):
        step = f"{SIZES[x.dtype]}" if x.kind == "block" else f"{SIZES[x.dtype]} * kBlock"
        lines.append(f"    const char* in{k} = call.in[{k}] + b * {step};")
        if x.kind == "block":
            lines.append(f"    const {TYPES[x.dtype][1]} i{k} = splat(*(const {_scalar(x.dtype)}*)in{k});")
    for k, x in enumerate(program.outputs):
        step = f"{SIZES[x.dtype]}" if x.kind == "block" else f"{SIZES[x.dtype]} * kBlock"
        lines.append(f"    char* out{k} = call.out[{k}] + b * {step};")
    for phase in range(1 + max(plan.phase.values())):
        for node in nodes.values():
            if node.kind == "block" and plan.phase[node.name] == phase and not node.operation.startswith("reduce"):
                lines.append("    " + _define(node, nodes))
        for loop in plan.loops:
            if loop.phase == phase:
                lines += _loop(loop, plan, nodes, outputs, program)
    for k, (x, value) in enumerate(zip(program.outputs, outputs, strict=True)):
        if x.kind == "block":
            lines.append(f"    *({_scalar(x.dtype)}*)out{k} = {value}[0];")
    lines += ["  }", "}", ""]
    return "\n".join(lines)


def _loop(loop: Loop, plan: Schedule, nodes: Nodes, outputs: list[str], program: Program) -> list[str]:
    """A loop over the block, and the numbers that it reduces it to."""
    reductions = [nodes[name] for name in loop.reductions]
    if unknown := {node.operation for node in reductions} - {"reduce_magnitude"}:
        raise NotImplementedError(f"a program reduces blocks by {unknown}; reduce.h has the largest magnitude only")
    turn = _turn(loop, plan, nodes, outputs, program)
    of_bytes = [k for k in loop.stores if SIZES[program.outputs[k].dtype] == 1]
    lines = [f"    LargestMagnitude r_{node.name};" for node in reductions]
    if of_bytes:  # which are packed from several turns
        lines.append("    for (int strip = 0; strip < kBlock; strip += kTurns * kLanes) {")
        lines += [f"      I b{k}[kTurns];" for k in of_bytes]
        lines.append("      TURNS for (int turn = 0; turn < kTurns; ++turn) {")
        lines += ["      const int i = strip + turn * kLanes;", *turn, "      }"]
        lines += [f"      storeBytes(out{k} + strip, b{k});" for k in of_bytes]
    else:
        lines += ["    for (int i = 0; i < kBlock; i += kLanes) {", *turn]
    lines.append("    }")
    if reductions:
        lines.append("    if (call.valid < kBlock) {")
        lines += [f"      r_{n.name} = ragged<LargestMagnitude>(c_{n.arguments[0]}, call.valid);" for n in reductions]
        lines.append("    }")
    return lines + [f"    const F {n.name} = r_{n.name}.result();" for n in reductions]


def _computes(node: Node) -> bool:
    """Whether an operation on elements takes a processor's time: more than a value under another type does."""
    return (
        node.kind == "element"
        and node.operation not in ("bitcast_convert_type", "is already", "iota:0")
        and not (node.operation == "convert_element_type" and {node.dtype, *node.types} <= set(INTEGERS))
    )


def _turn(loop: Loop, plan: Schedule, nodes: Nodes, outputs: list[str], program: Program) -> list[str]:
    """What a loop does with one vector of each array: of elements from i on."""
    lines = []
    needed = {a for name in loop.work for a in nodes[name].arguments} | {outputs[k] for k in loop.stores}
    for k, x in enumerate(program.inputs):
        if f"i{k}" in needed and x.kind == "element":
            _, kind, load, _ = TYPES[x.dtype]
            lines.append(f"      const {kind} i{k} = {load}(in{k} + i * {SIZES[x.dtype]});")
    for name in plan.carried:
        kind = TYPES[nodes[name].dtype][1].replace("M", "I")
        if name in needed and name not in loop.work:
            lines.append(f"      const {kind} {name} = load{kind}(c_{name} + 4 * i);")
    for name in loop.work:
        lines.append("      " + _define(nodes[name], nodes))
        if name in plan.carried:
            kind = TYPES[nodes[name].dtype][1].replace("M", "I")
            lines.append(f"      store{kind}(c_{name} + 4 * i, {name});")
    lines += [f"      r_{name}.add({nodes[name].arguments[0]});" for name in loop.reductions]
    for k in loop.stores:
        x = program.outputs[k]
        if (size := SIZES[x.dtype]) == 1:
            lines.append(f"      b{k}[turn] = {outputs[k]};")
        else:
            lines.append(f"      {TYPES[x.dtype][3]}(out{k} + i * {size}, {outputs[k]});")
    return lines


def _define(node: Node, nodes: Nodes) -> str:
    kind = TYPES[node.dtype][1]
    types = [nodes[a].dtype if a in nodes else node.types[k] for k, a in enumerate(node.arguments)]
    arguments = [_wrapped(_argument(a, t), t, a, node.operation) for a, t in zip(node.arguments, types, strict=True)]
    if node.operation == "convert_element_type":
        text = _converted(arguments[0], types[0], node.dtype, nodes.get(node.arguments[0]))
    elif node.operation == "bitcast_convert_type":
        text = f"as{kind}({arguments[0]})"
    elif node.operation == "table":
        scalar = "float" if kind == "F" else "int32_t"
        values = ", ".join(_number(x, node.dtype) for x in (*node.table, *[node.table[-1]] * (16 - len(node.table))))
        return (
            f"static const {scalar} t_{node.name}[16] = {{{values}}}; "
            f"const {kind} {node.name} = look_up({arguments[0]}, t_{node.name});"
        )
    else:
        text = PLAIN[node.operation].format(*arguments, T=kind)
    if node.dtype == "bfloat16" and node.operation in ("add", "sub", "mul", "div", "integer_pow:2", "sqrt"):
        text = f"to_bf16({text})"
    return f"const {kind} {node.name} = {text};"


def _wrapped(text: str, dtype: str, name: str, operation: str) -> str:
    """Narrow integers are kept modulo 2^8 or 2^16 until their value matters."""
    if dtype in ("int8", "uint8", "int16") and name.startswith("v") and operation != "select_n":
        return f"wrap_{TYPES[dtype][0]}({text})"
    return text


def _converted(x: str, source: str, target: str, producer: Node | None) -> str:
    if target == "bfloat16":
        return f"to_bf16({x})"
    if target == "float32":
        if source == "bfloat16":
            return x
        if source == "bool":
            return f"choose({x}, F{{}}, splat(1.0f))"
        if producer is not None and producer.operation == "shift_right_logical":
            return f"to_float(asI({x}))"
        return f"to_float({x})"
    if source in ("float32", "bfloat16"):
        limits = {"int8": "-128, 127", "uint8": "0, 255", "int16": "-32768, 32767", "int32": ""}[target]
        return f"to_int({x}, {limits})" if limits else f"to_int({x})"
    if source == "bool":
        return f"as{TYPES[target][1]}(-{x})"
    if target == "bool":
        return f"(M)({x} != 0)"
    return f"as{TYPES[target][1]}({x})"


def _argument(name: str, dtype: str) -> str:
    if name == "@base":
        return "splat(base)"
    if name == "@number":
        return "splat(call.number)"
    if name.startswith("$"):
        return "s" + name[1:]
    if name[0] in "iv":
        return name
    if name.startswith("#"):  # a float by its bits
        return f"splat({_number(name, dtype)})"
    if dtype == "bool":
        return f"splat({-int(name)})"
    return f"splat(({_scalar(dtype)}){_number(int(name), dtype)})"


def _number(x: str | int, dtype: str) -> str:
    if isinstance(x, str) and x.startswith("#"):
        value = np.uint32(int(x[1:])).view(np.float32)
        if not np.isfinite(value):
            return '__builtin_nanf("")' if np.isnan(value) else f"{'-' if value < 0 else ''}__builtin_inff()"
        return f"{float(value).hex()}f"
    x = int(x)
    return f"{x}u" if dtype == "uint32" else f"(-{-(x + 1)} - 1)" if x < 0 else str(x)


def _scalar(dtype: str) -> str:
    return {"float32": "float", "uint32": "uint32_t"}.get(dtype, "int32_t")


def print_table(programs: Sequence[Program]) -> str:
    """What the handler has to know of each kernel, and the functions' names."""
    lines = []
    for program in programs:
        for direction, arrays in (("in", program.inputs), ("out", program.outputs)):
            listed = ", ".join(f"{{Type::{TYPES[x.dtype][0]}, {str(x.kind == 'block').lower()}}}" for x in arrays)
            lines.append(f"static const Array {direction}_{program.name}[] = {{{listed}}};")
    rows = [
        f'  {{"{p.name}", {len(p.scalars)}, {len(p.inputs)}, {len(p.outputs)}, '
        f"in_{p.name}, out_{p.name}, {str(p.by_rows).lower()}}},"
        for p in programs
    ]
    each = "\n".join(f"EACH({program.name})" for program in programs)
    return "\n".join(
        [
            "#ifndef EACH",
            *lines,
            f"const int kKernels = {len(programs)};",
            "const Kernel kernels[] = {",
            *rows,
            "};",
            "#else",
            each,
            "#endif",
            "",
        ]
    )
