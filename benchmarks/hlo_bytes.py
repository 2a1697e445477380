"""Bytes that a compiled XLA program moves through device memory, counted from its text.

`compiled.cost_analysis()["bytes accessed"]` leaves custom calls (Pallas kernels) out. This counts, for every top-level
instruction of the entry computation, each distinct operand once and each output once:

    from hlo_bytes import moved
    total, rows = moved(jax.jit(step, donate_argnums=(0, 1)).lower(*args).compile().as_text())

For a float32 optax.adam step on one 16384 x 16384 leaf, compiled for TPU v5e, both give 28.00 bytes per parameter.
Use leaves too large for the chip's on-chip memory (16384 x 16384; 4096 x 4096 fits and distorts the figure).
"""

import re

_BYTES = dict(
    pred=1, s8=1, u8=1, s16=2, u16=2, bf16=2, f16=2, s32=4, u32=4, f32=4, s64=8, u64=8, f64=8, f8e4m3fn=1, f8e5m2=1
)
ARRAY = re.compile(rf"\b({'|'.join(_BYTES)})\[([\d,]*)\]")
_FREE = {"parameter", "tuple", "get-tuple-element", "bitcast", "constant", "after-all", "copy-done", "slice-done"}


def size(types: str) -> int:
    """Bytes of all arrays named in an HLO type, tuples included."""
    total = 0
    for dtype, dims in ARRAY.findall(types):
        count = 1
        for dim in filter(None, dims.split(",")):
            count *= int(dim)
        total += count * _BYTES[dtype]
    return total


def moved(hlo: str) -> tuple[int, list[tuple[int, str, str]]]:
    """(bytes read and written, rows of (bytes, operation, name), largest first)."""
    entry = hlo[hlo.index("\nENTRY") :]
    entry = re.sub(r"/\*index=\d+\*/", "", entry[: entry.index("\n}")])  # in types of tuples
    types: dict[str, str] = {}
    rows = []
    for line in entry.splitlines():
        head = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*)$", line)
        if not head:
            continue
        body = re.match(r"((?:\([^=]*?\)|[\w\[\],{}:()*#\s]+?))\s+([\w\-]+)\((.*)$", head[2])
        if not body:
            continue
        types[head[1]], operation = body[1], body[2]
        if operation in _FREE:
            continue
        count = size(body[1])
        if not operation.endswith("-start"):  # an asynchronous copy's type names both its ends
            count += sum(size(types.get(name, "")) for name in set(re.findall(r"%([\w.\-]+)", body[3].split("), ")[0])))
        rows.append((count, operation, head[1]))
    return sum(row[0] for row in rows), sorted(rows, reverse=True)
