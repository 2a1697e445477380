"""``python -m adamite memory``: what a training run will weigh, before anybody buys it."""

import argparse
import math
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, AxisType

from adamite.algorithms.adam import adamw
from adamite.memory import MemoryReport, memory_report
from adamite.planning import decoder, layouts, sent
from adamite.rounding import NAMES as ROUNDINGS
from adamite.sharding.layout import names_of

MOMENTS = ("float32", "bfloat16", "int8", "int8+float8")
MOST, MOST_DEVICES = 10**13, 10**6
UNITS = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
FLOAT32 = 16  # bytes of optax.adamw: weights, gradients, mu and nu, 4 each
ASSUMED = """\
The model is taken to be a decoder: in each layer four matrices, (d, 3d), (d, d), (d, 4d), (4d, d), and two vectors of
d, with d about 128 times the number of layers; an embedding takes what is left, about an eighth. With --devices,
weights, gradients and state are sharded evenly over them. With --mesh, the axis "model" cuts every matrix, and three
ways to use the axis "data" stand side by side: all of its devices keep the same (replicated), each keeps its part of
the state (ZeRO-1), or of weights, gradients and state (FSDP). What a device sends each step over the axis "data" is
for gradients of the weights' dtype and rings; FSDP gathers the weights forward and backward, and holds those of a
layer or two beside the table. What the axis "model" moves depends on the batch, and is not counted. A GB is 10^9
bytes. For a model and shardings of your own there is adamite.memory_report.
"""


def plan(options: argparse.Namespace) -> str:
    """The table, and what is not in it."""
    params = [jax.ShapeDtypeStruct(shape, jnp.dtype(options.weights)) for shape in decoder(options.params)]
    moments = tuple(options.moments.split("+")) if "+" in options.moments else options.moments
    tx = adamw(1e-3, moments=moments, rounding=options.rounding)
    many = (
        "a mesh of " + ", ".join(f"{name} = {n}" for name, n in options.mesh.shape.items())
        if options.mesh
        else (f"{options.devices:,} device{'s' if options.devices > 1 else ''}")
    )
    rounding = f", rounding {options.rounding}" if options.rounding else ""
    title = f"{options.params:,} parameters on {many}: AdamW, moments {options.moments}{rounding}"
    if options.mesh:
        return "\n".join([title, "", *_on_mesh(tx, params, options)])
    report = memory_report(tx, params)
    return "\n".join([title, "", *_table(report, options), "", *_beside(report, options)])


def main(arguments: Sequence[str] | None = None) -> None:
    """Print what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m adamite", description="What an optimizer costs.")
    memory = parser.add_subparsers(required=True).add_parser(
        "memory",
        help="plan the memory of a training run",
        description="What weights, gradients and AdamW's state weigh, beside optax.adamw in float32.",
        epilog=ASSUMED,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    number = "number of parameters, such as 124M, 8B or 8e9"
    memory.add_argument("--params", type=_count, required=True, metavar="N", help=number)
    memory.add_argument("--moments", choices=MOMENTS, default="float32", help="how moments are kept (float32)")
    memory.add_argument("--rounding", choices=tuple(ROUNDINGS), help="how 16-bit weights take updates (as in optax)")
    weights = "dtype of weights and gradients (bfloat16 with a rounding, else float32)"
    memory.add_argument("--weights", choices=("bfloat16", "float32"), help=weights)
    where = memory.add_mutually_exclusive_group()
    where.add_argument("--devices", type=_count, metavar="N", help="how many devices share all that (1)")
    where.add_argument("--mesh", type=_mesh, metavar="AXES", help="or the axes of their mesh, such as data=64,model=8")
    memory.add_argument("--hbm", type=_gigabytes, metavar="GB", help="memory of one device: say whether it is enough")
    options = parser.parse_args(arguments)
    if options.rounding and options.weights == "float32":
        memory.error("argument --rounding: it is for weights of 16 bits; leave it out, or --weights float32")
    options.devices = options.devices or 1
    options.weights = options.weights or ("bfloat16" if options.rounding else "float32")
    jax.config.update("jax_platforms", "cpu")  # nothing will be computed: accelerators stay with whoever has them
    print(plan(options))


def _table(report: MemoryReport, options: argparse.Namespace) -> list[str]:
    names = [f"weights, {options.weights}", f"gradients, {options.weights}", "optimizer state", "together"]
    rows = [*zip(names, (*report.bytes, report.bytes.total), strict=True)]
    rows.append(("optax.adamw, float32", FLOAT32 * report.parameters))
    lines = [f"{'':24}{'bytes/parameter':>16}{'GB':>16}{'GB/device':>16}"]
    for name, count in rows:
        gigabytes = count / 1e9
        per_device = gigabytes / options.devices
        lines.append(f"{name:24}{count / report.parameters:16.2f}{gigabytes:16,.3f}{per_device:16,.3f}")
    return lines


def _on_mesh(tx: optax.GradientTransformation, params: list[jax.ShapeDtypeStruct], options: Any) -> list[str]:
    """What a device keeps and sends, the ways to lay it side by side."""
    ways = layouts(tx, params, options.mesh)
    reports = [memory_report(way.tx, params, shardings=way.shardings).per_device for way in ways.values()]
    rows = {
        f"weights, {options.weights}": [report.weights for report in reports],
        f"gradients, {options.weights}": [report.gradients for report in reports],
        "optimizer state": [report.state for report in reports],
        "together": [report.total for report in reports],
        "sent each step": [sent(way, params) for way in ways.values()],
    }
    lines = [f"{'GB on each device':24}" + "".join(f"{name:>16}" for name in ways)]
    lines += [f"{name:24}" + "".join(f"{count / 1e9:16,.3f}" for count in counts) for name, counts in rows.items()]
    for axis, way in {axis: "FSDP" if axis == "data" else "replicated" for axis in options.mesh.axis_names}.items():
        pairs = zip(params, ways[way].shardings, strict=True)
        whole = sum(p.size for p, sharding in pairs if axis not in names_of(sharding)) / sum(p.size for p in params)
        if whole >= 0.01 and options.mesh.shape[axis] > 1:
            lines.append(f"{axis} = {options.mesh.shape[axis]} divides no dimension of {whole:.0%} of the parameters")
    if options.hbm is not None:
        left = [options.hbm - report.total / 1e9 for report in reports]
        lines.append(f"{f'left of {options.hbm:g} GB':24}" + "".join(f"{room:16,.3f}" for room in left))
    return lines


def _beside(report: MemoryReport, options: argparse.Namespace) -> list[str]:
    """What is not in the table, and whether there is room for it."""
    largest = max(math.prod(leaf.shape) for leaf in report.leaves)
    lines = [
        "Not in the table: activations, and what a step computes on its way. Count on the float32 update of the",
        f"largest leaf, here {4 * largest / 1e9 / options.devices:,.3f} GB/device; the compiler knows how much it is:",
        "jax.jit(step).lower(...).compile().memory_analysis()",
    ]
    if options.hbm is None:
        return lines
    room = options.hbm - report.bytes.total / 1e9 / options.devices
    if room >= 0:
        return [*lines, "", f"Of {options.hbm:g} GB on each device {room:,.3f} GB are left for that."]
    devices = math.ceil(report.bytes.total / 1e9 / options.hbm)
    return [*lines, "", f"{options.hbm:g} GB on each device are not enough: the table alone takes {devices:,} of them."]


def _count(text: str) -> int:
    """A whole number, such as 124M."""
    digits, unit = (text[:-1], UNITS[text[-1].upper()]) if text[-1:].upper() in UNITS else (text, 1)
    try:
        number = Fraction(digits) * unit
    except (ValueError, ZeroDivisionError):
        number = Fraction(0)
    if not (1 <= number <= MOST and number.denominator == 1):
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 to {MOST:.0e}, such as 124M, got {text!r}")
    return int(number)


def _mesh(text: str) -> AbstractMesh:
    """A mesh of no devices yet."""
    axes = dict(re.findall(r"(?:^|,)(data|model)=(\d{1,6})(?=,|$)", text))
    sizes = {name: int(n) for name, n in axes.items()}
    if ",".join(f"{name}={n}" for name, n in axes.items()) != text or "data" not in axes or not all(sizes.values()):
        raise argparse.ArgumentTypeError(f"must be data=N or data=N,model=M, such as data=64,model=8, got {text!r}")
    if math.prod(sizes.values()) > MOST_DEVICES:
        raise argparse.ArgumentTypeError(f"must have at most {MOST_DEVICES:,} devices, got {text!r}")
    return AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def _gigabytes(text: str) -> float:
    number = _number(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"must be a finite number of GB > 0, got {text!r}")
    return number


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


if __name__ == "__main__":
    main()
