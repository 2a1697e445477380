"""Write the kernels of the grid as C++ files: ``python generate.py FOLDER`` (called by CMake)."""

import argparse
import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent / "src"))

import adamite_native
from adamite_native.grid import kernels

from adamite.engines.native.cpp import print_kernel, print_table

FILES = 8
"""How many files the kernels are spread over, so that several processors can compile them."""


def main() -> None:
    """Read the arguments and write the files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--only", default="", help="a part of the names of the recipes to generate")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    found = sorted(kernels(options.only), key=lambda kernel: kernel.program.name)

    printed = [print_kernel(*kernel) for kernel in found]
    shares: list[list[str]] = [[] for _ in range(FILES)]
    for text in sorted(printed, key=len, reverse=True):
        min(shares, key=lambda share: sum(map(len, share))).append(text)
    for number, share in enumerate(shares):
        write(options.folder / f"kernels_{number}.inc", "\n".join(share))
    write(options.folder / "table.inc", print_table([kernel.program for kernel in found]))
    names = {kernel.program.name: kernel.recipes for kernel in found}
    contents = {"built_with": adamite_native.versions(), "kernels": names}
    write(options.folder / "kernels.json", json.dumps(contents, indent=1))
    print(f"{len(found)} kernels")


def write(path: pathlib.Path, text: str) -> None:
    """Write what is new only: what did not change is not compiled again."""
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


if __name__ == "__main__":
    main()
