"""Are the kernels for NVIDIA's GPUs right, and how fast are they? `make gpu`, within five minutes on one H100 or H200.

Nothing is installed. It takes a Python with JAX for CUDA, Optax and NumPy, and g++; torch is timed and a picture drawn
where torch and matplotlib are. adamite is that of this checkout, and what adamite-native has for GPUs is built in a
temporary folder.

    card       the GPU, its driver and clocks, versions
    torch      its fused AdamW and a copy, in a process of its own, while the handler is built
    nvrtc      seconds for the texts of some formats
    bits       every kind of step beside the emulation on this CPU (`gpu_bits.py`)
    ways       races, donation, scan, CUDA graphs, vmap, meshes, derivatives, a leaf of 2^31 elements (`gpu_ways.py`)
    steps      beside a copy, optax and torch: a leaf of 268M, GPT-2 small, 1,000 leaves of 4,096 (`gpu_speed.py`)
    training   whole training steps of a GPT-2-sized model (`gpu_training.py`)
    xla, more  what is wanted less: bits beside engine="xla"; updates, other formats, engine="xla"

A part ends when its share of the budget is spent; what it did not come to is "left out". The JSON is written after each
item. A process that dies is followed by another, which goes on behind the item that it died in. `--emulated` rehearses
all of it, tiny, on a CPU.
"""

import argparse
import faulthandler
import importlib.metadata
import json
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from typing import Any

import gpu_build
from gpu_record import BROKEN, Record

PARTS = {"nvrtc": 0.22, "bits": 0.42, "ways": 0.55, "steps": 0.78, "training": 0.9, "xla": 0.93, "more": 1.0}
"""The share of the budget that is spent when a part ends."""
LAST = 8.0
"""Seconds that are kept for the picture."""
QUERY = "name,driver_version,memory.total,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu"
RESTARTS = 6


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Bits and speed of the kernels for NVIDIA's GPUs.")
    parser.add_argument("--budget", type=float, default=280.0, help="seconds that all of it may take (default 280)")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"some of {', '.join(PARTS)}, torch (default all)")
    parser.add_argument("--out", type=pathlib.Path, help="folder of gpu-NAME.json (default benchmarks/results)")
    parser.add_argument("--name", default="", help="the NAME (default: the GPU's)")
    parser.add_argument("--threads", type=int, default=min(8, os.cpu_count() or 1), help="that compile (default 8)")
    parser.add_argument("--emulated", action="store_true", help="a rehearsal without a GPU, tiny, into out/")
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    parser.add_argument("--start", type=float, default=0.0, help=argparse.SUPPRESS)
    return parser.parse_args()


def card(emulated: bool) -> dict[str, Any]:
    """The machine."""
    found: dict[str, Any] = {"python": platform.python_version(), "cores": os.cpu_count(), "versions": {}}
    for name in ("jax", "jaxlib", "jax-cuda13-plugin", "optax", "numpy", "nvidia-cuda-nvrtc", "torch", "matplotlib"):
        try:
            found["versions"][name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found["versions"][name] = None
    found["g++"] = output(["g++", "-dumpfullversion"])
    found["commit"] = output(["git", "-C", str(gpu_build.ROOT), "rev-parse", "--short", "HEAD"])
    if emulated:
        return found | {"name": "emulated"}
    values = output(["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"]).splitlines()
    return found | dict(
        zip(QUERY.split(","), [x.strip() for x in values[0].split(",")] if values else (), strict=False)
    )


def output(command: list[str]) -> str:
    """What a command prints; "" if it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def prepare(record: Record, folder: pathlib.Path, wanted: list[str]) -> dict[str, str]:
    """Build the handler, while torch is timed. Returns the environment of the processes that come."""
    torch = None
    if "torch" in wanted:
        script = str(pathlib.Path(__file__).parent / "gpu_torch.py")
        command = [sys.executable, script, *(["--tiny"] if record.emulated else [])]
        torch = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    began = time.time()
    environment = gpu_build.build(folder, emulated=record.emulated)
    record.set("build", {"seconds": round(time.time() - began, 1)})
    record.say(f"the handler is built: {record.result['build']['seconds']} s")
    if torch:
        try:
            said, errors = torch.communicate(timeout=max(0.18 * record.budget - record.seconds(), 5))
            record.set(
                "torch", json.loads(said.splitlines()[-1]) if torch.returncode == 0 else {"error": errors[-2000:]}
            )
        except Exception as error:
            torch.kill()
            record.set("torch", {"error": repr(error)})
        record.say(f"torch: {json.dumps(record.result['torch'])[-800:]}")
    return os.environ | environment


def run_parts(record: Record, options: argparse.Namespace, folder: pathlib.Path, environment: dict[str, str]) -> None:
    """Run the parts in a process, and in another where that dies."""
    threads = options.threads
    for turn in range(RESTARTS):
        command = [
            *(sys.executable, __file__, "--child", str(folder), "--start", str(record.start), "--parts", options.parts),
            *("--budget", str(options.budget - LAST), "--name", str(record.path), "--threads", str(threads)),
            *(["--emulated"] if options.emulated else []),
        ]
        errors = folder / f"errors-{turn}.txt"
        with errors.open("w") as stderr:
            process = subprocess.Popen(command, env=environment, stderr=stderr)
            try:
                code: int | None = process.wait(timeout=max(record.left() - LAST / 2, 1))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                code = None
        record.result = json.loads(record.path.read_text())
        said = errors.read_text(errors="replace")
        record.set(f"stderr {turn}", said[-8000:] if code else said[-1500:])
        if code == 0:
            return
        doing, record.result["doing"] = record.result["doing"], []
        record.say(f"a process ended with {code} in {doing}:\n{said[-1500:]}")
        if code != BROKEN and len(doing) <= 1:
            for key in doing or ["between items"]:
                record.failed(key, f"the process ended with {code}", said)
                record.result["done"].append(key)
        threads = 1
        record.save()
        if record.left() < 4 * LAST or code is None:
            return
        if not record.result["done"] and not doing:
            return  # it died before its first item


def child(options: argparse.Namespace) -> None:
    """Run the parts in this process."""
    faulthandler.enable()
    folder = pathlib.Path(options.child)
    gpu_build.use(folder)
    if options.emulated:
        gpu_build.emulate()
    import gpu_bits
    import gpu_speed
    import gpu_training
    import gpu_ways
    import jax

    from adamite.engines.native import gpu

    record = Record(
        pathlib.Path(options.name), options.start, options.budget, emulated=options.emulated, threads=options.threads
    )
    device = jax.devices()[0]
    record.say(f"jax {jax.__version__} on {device.device_kind} ({device.platform})")
    record.set(
        "device", {"kind": device.device_kind, "platform": device.platform, "xla": device.client.platform_version}
    )
    record.set("why no kernel", gpu._refused())  # asked here, before there are threads
    functions = {
        "nvrtc": gpu_bits.nvrtc, "bits": gpu_bits.bits, "ways": gpu_ways.ways, "steps": gpu_speed.steps,
        "training": gpu_training.training, "xla": gpu_bits.xla, "more": gpu_speed.more,
    }  # fmt: skip
    for part, share in PARTS.items():
        if part in options.parts.split(","):
            began = record.seconds()
            functions[part](record, share)
            record.say(f"{part}: {record.seconds() - began:.1f} s")
            record.set(f"seconds of {part}", round(record.seconds() - began, 1))
    record.set("memory", {k: v for k, v in (device.memory_stats() or {}).items() if "peak" in k or "limit" in k})
    sys.stdout.flush()
    os._exit(0)  # a thread may still compile


def summary(record: Record) -> None:
    """What was found, in a few lines."""
    rows = record.result["rows"]
    wrong = [x["name"] for x in rows.get("bits", []) if x["plain, emulated"] or x["odd, emulated"]]
    record.say(f"bits: {len(rows.get('bits', [])) - len(wrong)} kinds of step equal the emulation, {len(wrong)} do not")
    for name in wrong:
        record.say(f"  {name}")
    record.say(f"races: {sum(x['others'] for x in rows.get('races', []))} repetitions gave other bits")
    for row in rows.get("ways", []):
        if row.get("differ"):
            record.say(f"ways: {row['name']}: {row['differ']} elements differ")
    record.say(f"{len(record.result['failures'])} failures, {len(record.result['left out'])} items left out")
    for failure in record.result["failures"]:
        record.say(f"  {failure['item']}: {failure['error'][:200]}")


def main() -> None:
    options = arguments()
    if options.child:
        child(options)
        return
    start = time.time()
    machine = card(options.emulated)
    words = (options.name or machine.get("name") or "unknown").lower().replace("nvidia", "").split()
    out = options.out or gpu_build.ROOT / ("out" if options.emulated else "benchmarks/results")
    path = out / f"gpu-{'-'.join(words)}.json"
    path.unlink(missing_ok=True)
    record = Record(path, start, options.budget, emulated=options.emulated, threads=options.threads)
    record.set("machine", machine)
    record.say(json.dumps(machine))
    wanted = [*options.parts.split(","), *(["torch"] if options.parts == ",".join(PARTS) else [])]
    folder = pathlib.Path(tempfile.mkdtemp(prefix="adamite-gpu-"))
    try:
        run_parts(record, options, folder, prepare(record, folder, wanted))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    summary(record)
    record.say(f"wrote {path}")
    try:
        from gpu_picture import draw

        draw(record.result, path.with_suffix(".png"))
        record.say(f"wrote {path.with_suffix('.png')}")
    except ImportError:
        record.say("no picture: matplotlib is not there")


if __name__ == "__main__":
    main()
