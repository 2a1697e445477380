"""Train with adamite: a classifier of digits under six optimizers, and a small language model.

    python examples/train --task all --out out

Ctrl-C leaves a checkpoint in the output folder; the same command with --resume goes on from it, bit for bit.
"""

import argparse
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import digits
import language
import pictures
from checkpoint import InterruptError, ResumeError, Run
from report import Report

SEEDS = 2**31
PACKAGES = ("adamite", "jax", "jaxlib", "optax", "flax", "orbax-checkpoint", "numpy", "scikit-learn")


def whole_number(low: int, below: int) -> Callable[[str], int]:
    """What reads an option that must be a whole number in [low, below)."""

    def read(text: str) -> int:
        try:
            if low <= (number := int(text)) < below:
                return number
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f"must be a whole number from {low} to {below - 1}, got {text!r}")

    return read


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        "examples/train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    count = whole_number(1, 10**6 + 1)
    parser.add_argument("--task", choices=["digits", "language", "all"], default="all", help="what to train (all)")
    parser.add_argument("--epochs", type=count, default=20, metavar="N", help="passes over the digits (20)")
    parser.add_argument("--steps", type=count, default=1000, metavar="N", help="steps of the language model (1000)")
    parser.add_argument(
        "--optimizer",
        nargs="+",
        choices=list(digits.OPTIMIZERS),
        default=list(digits.OPTIMIZERS),
        metavar="NAME",
        help=f"optimizers for the digits, of {', '.join(digits.OPTIMIZERS)} (all)",
    )
    parser.add_argument("--seed", type=whole_number(0, SEEDS), default=0, metavar="N", help="of all randomness (0)")
    parser.add_argument(
        "--broken",
        type=whole_number(0, 10**6 + 1),
        default=0,
        metavar="N",
        help="put a NaN minibatch before every N-th of the language model's: nothing changes (0: none)",
    )
    parser.add_argument("--out", type=Path, default=Path("out"), metavar="DIR", help="folder of the results (out)")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in the folder of the results")
    return parser


def train(run: Run, report: Report, broken: int) -> None:
    """Do what the run's options say and is not yet in its record."""
    options = run.record["options"]
    if options["task"] != "language":
        digits.compare(options["optimizer"], options["epochs"], options["seed"], run, report)
    if options["task"] != "digits":
        language.train(options["steps"], options["seed"], run, report, broken)


def write(run: Run, out: Path, report: Report) -> None:
    """Draw the pictures and write the numbers of a finished run, and say where they are."""
    record = run.record
    files = ["train.json"]
    if log := record.get("digits"):
        digits.summarize(log, report)
        best = "adam" if "adam" in log else next(iter(log))
        pictures.draw_curves(log, out / "curves.png")
        pictures.draw_confusion(best, log[best], out / "confusion.png")
        files += ["curves.png", "confusion.png"]
    if log := record.get("language"):
        language.summarize(log, report)
        pictures.draw_language(log, out / "language.png")
        (out / "sample.txt").write_text(language.as_text(log), encoding="utf-8")
        files += ["language.png", "sample.txt"]
    machine = {"platform": platform.platform(), "cpus": os.cpu_count()}
    versions = {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}
    numbers = json.dumps(record | {"machine": machine, "versions": versions}, indent=1)
    (out / "train.json").write_text(numbers + "\n", encoding="utf-8")
    report.say(f"\nIn {out}: {', '.join(files)}")


def main() -> int:
    """Train, write, and say so; 130 after Ctrl-C, as shells have it."""
    began = time.perf_counter()
    command = parser()
    given = command.parse_args()
    names = [name for name in digits.OPTIMIZERS if name in given.optimizer]
    options = {"task": given.task, "epochs": given.epochs, "steps": given.steps, "optimizer": names, "seed": given.seed}
    report = Report()
    try:
        given.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        command.error(f"argument --out: must be a folder to write into, got {str(given.out)!r}: {error.strerror}")
    try:
        with Run(given.out / "checkpoint", options, resume=given.resume) as run:
            report.say(plan(options, given.out))
            train(run, report, given.broken)
            write(run, given.out, report)
    except InterruptError:
        again = shlex.join([*sys.orig_argv, *([] if given.resume else ["--resume"])])
        report.say(f"\nInterrupted; the checkpoint is saved. To go on:\n  {again}")
        return 130
    except ResumeError as error:
        command.error(str(error))
    report.say(f"Done in {time.perf_counter() - began:.0f} s.")
    return 0


def plan(options: dict[str, Any], out: Path) -> str:
    """What is going to happen."""
    parts = {
        "digits": f"a classifier of digits, {options['epochs']} epochs, with {', '.join(options['optimizer'])}",
        "language": f"a language model, {options['steps']} steps, with adamw",
    }
    chosen = [text for task, text in parts.items() if options["task"] in (task, "all")]
    return "\n".join(["Going to train", *(f"  - {text}" for text in chosen), f"and to write the results into {out}."])


if __name__ == "__main__":
    sys.exit(main())
