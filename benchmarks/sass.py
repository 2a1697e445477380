"""What NVRTC makes of a printed kernel, read from its machine code: no GPU is needed.

    from sass import report
    report(text, (9, 0), read=128, written=96)      # {"registers": 52, "spilled bytes": 0, ...}

NVRTC and nvdisasm are those of the wheels nvidia-cuda-nvrtc and nvidia-cuda-nvdisasm, found as Python finds packages
(`make gpu-check` installs them apart). In each turn of a loop of ``TURNS`` a lane steps ``EACH`` elements; the text
defines both.

The fast path is found in the code itself: the shortest path through the loop that reads and writes all that a lane has
to, by words of at least 4 bytes. So it leaves out what slows a division or a root of subnormal numbers. Code before the
loop is counted in the same way, shared by all turns; there the search for a CTA's leaf counts nothing, as if there were
one leaf.
"""

import collections
import ctypes
import functools
import importlib.util
import pathlib
import re
import subprocess
import tempfile
import time
from typing import Any, NamedTuple

OPTIONS = ("--fmad=false", "--std=c++17", "-default-device")
"""Those of the engine."""

MEMORY = re.compile(r"(?:LDG|STG)\.E\b")
ACCESSES = ("LDG", "STG", "LDS", "STS", "LDL", "STL")
WIDTHS = {"U8": 0, "S8": 0, "U16": 0, "S16": 0, "64": 8, "128": 16}
"""Bytes by the suffix of an access; without one it is 4. Narrower ones are not on a fast path."""

PIPES = {
    "fma": ("FADD", "FMUL", "FFMA", "FFMA32I", "FMUL32I", "FADD32I", "FFMA2", "FADD2", "FMUL2"),
    "half": ("IMAD", "HFMA2", "HADD2", "HMUL2", "IDP"),
    "special": ("MUFU", "F2I", "I2F", "F2F", "FRND", "POPC", "FLO", "BREV", "REDUX"),
    "memory": ("LDG", "STG", "LDS", "STS", "LD", "ST", "SHFL", "ATOM", "RED", "LDSM", "LDL", "STL"),
    "other": (
        "R2UR", "LDC", "LDCU", "ULDC", "S2R", "S2UR", "CS2R", "BRA", "EXIT", "BSSY", "BSYNC", "CALL", "RET", "NOP",
        "BAR", "WARPSYNC", "ACQBULK", "DEPBAR", "YIELD", "BREAK", "PREEXIT", "MEMBAR", "ERRBAR",
    ),
}  # fmt: skip
"""Which unit executes what; all others are "alu", but for those of the uniform path (U...), which are "other"."""

LANES = {"fma": 128, "alu": 64, "half": 64, "special": 16, "memory": 32}
"""How many lanes a multiprocessor of compute capability 9.0 executes in a clock, CUDA C++ programming guide."""


class Instruction(NamedTuple):
    """One line of the code, or a label that stands before one."""

    name: str  # with its suffixes; "" for a label
    predicate: str  # "@P0", "@!P1" or ""
    rest: str  # the operands; of a label its name


class Gpu(NamedTuple):
    """What bounds a kernel."""

    multiprocessors: int
    clock: float  # Hz
    bandwidth: float  # bytes a second, as a copy reaches it


GPUS = {"H100": Gpu(132, 1.755e9, 3.0e12), "H200": Gpu(132, 1.755e9, 4.3e12)}


def report(
    text: str,
    compute_capability: tuple[int, int],
    read: int,
    written: int,
    *,
    leaves: int = 48,
    kernel: str = "adamite_step",
) -> dict[str, Any]:
    """What the text of a kernel costs on GPUs of a compute capability.

    Args:
        text: CUDA C++.
        compute_capability: major and minor.
        read: bytes that a lane reads in each turn.
        written: bytes that it writes.
        leaves: how many fit into the table.
        kernel: its name.

    Returns:
        ``compile s``, CPU seconds of NVRTC; ``registers`` of a thread and ``spilled bytes`` of its local memory;
        ``occupancy``, warps of a multiprocessor as a share of the most that there may be; ``code bytes``, of the whole
        kernel; and what `fast_path` returns.
    """
    code, log, seconds = compiled(text, compute_capability, leaves)
    used = re.search(r"Used (\d+) registers", log)
    frame, *spills = map(int, re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", log)[:3])
    if not used:
        raise ValueError(f"NVRTC's log names no registers:\n{log}")
    defined = {name: int(value) for name, value in re.findall(r"^#define (EACH|TURNS|WARPS) +(\d+)", text, re.M)}
    assembly = instructions(disassembled(code), kernel)
    return {
        "compile s": seconds,
        "registers": int(used[1]),
        "spilled bytes": frame + sum(spills),
        "occupancy": occupancy(int(used[1]), defined["WARPS"]),
        "code bytes": 16 * sum(bool(x.name) for x in assembly),
        **fast_path(assembly, defined["EACH"], defined["TURNS"], (read, written)),
    }


def fast_path(code: list[Instruction], elements: int, turns: int, moved: tuple[int, int]) -> dict[str, Any]:
    """What a lane executes where nothing is special.

    Args:
        code: of the whole kernel.
        elements: of a lane in each turn.
        turns: of the loop.
        moved: bytes that a lane reads and writes in each turn.

    Returns:
        ``instructions per element``; ``pipes``, the same of the loop alone by the unit that executes them; ``memory
        accesses`` of a lane in each turn; ``accesses``, their number by kind and width, and those of shared and local
        memory.
    """
    before, loop, times = _paths(code, moved, turns)
    names = [code[k].name for k in loop]
    pipes = collections.Counter(pipe(name) for name in names)
    of_all = elements * turns // times
    return {
        "instructions per element": (len(loop) + len(before) / times) / of_all,
        "pipes": {name: pipes[name] / of_all for name in (*LANES, "other")},
        "memory accesses": sum(bool(MEMORY.match(name)) for name in names),
        "accesses": dict(sorted(collections.Counter(name for name in names if name.startswith(ACCESSES)).items())),
    }


def time_of_issue(figures: dict[str, Any], moved: float, gpu: str) -> float:
    """How long the busiest unit, or the issue of instructions, takes: 1 is as long as the memory takes.

    Args:
        figures: of `report`.
        moved: bytes for each element.
        gpu: one of `GPUS`.
    """
    its = GPUS[gpu]
    lanes = {name: figures["pipes"][name] / LANES[name] for name in LANES}
    clocks = max(figures["instructions per element"] / 128, *lanes.values())
    return clocks / (its.multiprocessors * its.clock) / (moved / its.bandwidth)


def occupancy(registers: int, warps: int) -> float:
    """Warps that a multiprocessor with 65,536 registers holds at once, where it could hold 64."""
    of_warp = -(-registers // 8) * 8 * 32
    return min(64 // warps, 65536 // (of_warp * warps)) * warps / 64


def pipe(name: str) -> str:
    """The unit that executes an instruction."""
    base = name.split(".")[0]
    return next((unit for unit, names in PIPES.items() if base in names), "other" if base[0] == "U" else "alu")


def instructions(assembly: str, kernel: str) -> list[Instruction]:
    """Those of a kernel and of what it calls, in order, with labels."""
    found = []
    for line in assembly[assembly.index(f".text.{kernel}:") :].splitlines():
        if label := re.match(r"\s*\.?([.$\w]+):\s*$", line):
            found.append(Instruction("", "", label[1].lstrip(".")))
        elif one := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\s*(.*?);", line):
            found.append(Instruction(one[2], (one[1] or "").strip(), one[3]))
        elif line.startswith("\t.section") and found:
            break
    return found


def _paths(code: list[Instruction], least: tuple[int, int], turns: int) -> tuple[list[int], list[int], int]:
    """The fast path before the loop, through it, and how often that is gone; without a loop all of it is gone once."""
    labels = {x.rest: k for k, x in enumerate(code) if not x.name}
    back: dict[int, set[int]] = {}  # the instructions that jump back to the first of a loop
    for k, x in enumerate(code):
        if x.name.startswith("BRA") and (target := labels.get(_label(x), k + 1)) <= k:
            back.setdefault(target, set()).add(k)
    inside = {start: _walk(code, labels, start, ends, least) for start, ends in back.items()}
    if found := {start: path for start, path in inside.items() if path}:
        start = min(found, key=lambda one: len(found[one]))
        return _walk(code, labels, 0, {start}, (0, 0)), found[start], turns
    exits = {k for k, x in enumerate(code) if x.name == "EXIT"}
    if path := _walk(code, labels, 0, exits, (least[0] * turns, least[1] * turns)):
        return [], path, 1
    raise ValueError(f"no path through the kernel reads and writes {least} bytes")


def _walk(
    code: list[Instruction], labels: dict[str, int], start: int, ends: set[int], least: tuple[int, int]
) -> list[int]:
    """The shortest path from `start` to the first of `ends` that reads and writes so much; [] where there is none."""
    origin = (start, 0, 0)  # instruction, bytes read and written up to it, as far as they are needed
    best: dict[tuple[int, int, int], tuple[int, Any]] = {origin: (0, None)}  # instructions, and what came before
    at_hand: dict[int, set[tuple[int, int, int]]] = {start: {origin}}
    for k in range(start, max(ends) + 1):
        x = code[k]
        read, written = _access(x)
        for place in at_hand.pop(k, ()):
            count = best[place][0] + bool(x.name)
            moved = min(place[1] + read, least[0]), min(place[2] + written, least[1])
            if k in ends and moved == least:
                path = []
                while place:
                    path.append(place[0])
                    place = best[place][1]
                return [at for at in reversed(path) if code[at].name]
            for follow in _following(x, k, labels):
                then = (follow, *moved)
                if follow > k and (then not in best or best[then][0] > count):
                    best[then] = count, place
                    at_hand.setdefault(follow, set()).add(then)
    return []


def _following(x: Instruction, k: int, labels: dict[str, int]) -> list[int]:
    """Where it may go on, but for what it calls."""
    base = x.name.split(".")[0]
    always = not x.predicate and not re.match(r"!?U?P\d,", x.rest)
    if base == "CALL" or (base in ("EXIT", "RET") and always):
        return []
    if base != "BRA":
        return [k + 1]
    target = labels.get(_label(x), -1)
    return [target] if always and "DIV" not in x.name else [k + 1, target]


def _access(x: Instruction) -> tuple[int, int]:
    """Bytes that a lane reads and writes in a GPU's memory, by words of at least 4."""
    if not MEMORY.match(x.name):
        return 0, 0
    count = next((WIDTHS[part] for part in x.name.split(".") if part in WIDTHS), 4)
    return (count, 0) if x.name.startswith("LDG") else (0, count)


def _label(x: Instruction) -> str:
    found = re.search(r"\(\s*\.?([.$\w]+)\s*\)", x.rest)
    return found[1].lstrip(".") if found else ""


def compiled(text: str, compute_capability: tuple[int, int], leaves: int = 48) -> tuple[bytes, str, float]:
    """The machine code, ptxas' log, and the CPU seconds that it took."""
    nvrtc = _nvrtc()
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    _check(nvrtc.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"adamite.cu", 0, None, None))
    major, minor = compute_capability
    options = (f"--gpu-architecture=sm_{major}{minor}", f"-DLEAVES={leaves}", *OPTIONS, "--ptxas-options=-v")
    start = time.process_time()
    failed = nvrtc.nvrtcCompileProgram(
        program, len(options), (ctypes.c_char_p * len(options))(*(x.encode() for x in options))
    )
    seconds = time.process_time() - start
    _check(nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size)))
    log = ctypes.create_string_buffer(size.value)
    _check(nvrtc.nvrtcGetProgramLog(program, log))
    if failed:
        raise ValueError(log.value.decode())
    _check(nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size)))
    code = ctypes.create_string_buffer(size.value)
    _check(nvrtc.nvrtcGetCUBIN(program, code))
    _check(nvrtc.nvrtcDestroyProgram(ctypes.byref(program)))
    return code.raw, log.value.decode(), seconds


def disassembled(code: bytes) -> str:
    """Machine code as nvdisasm writes it."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        return subprocess.run([_file("nvdisasm"), "-c", file.name], check=True, capture_output=True, text=True).stdout


@functools.cache
def _nvrtc() -> Any:
    return ctypes.CDLL(str(_file("libnvrtc.so.*")))


def _file(name: str) -> pathlib.Path:
    """Of the wheels, in nvidia/cu13/lib or nvidia/cu13/bin."""
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations or () if spec else ():
        if found := sorted(pathlib.Path(folder).glob(f"cu*/*/{name}")):
            return found[-1]
    raise FileNotFoundError(f"no wheel of NVIDIA's that is installed has {name}")


def _check(status: int) -> None:
    if status:
        raise RuntimeError(f"NVRTC failed with {_nvrtc().nvrtcGetErrorString(status)}")
