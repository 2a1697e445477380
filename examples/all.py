"""Runs every example of this folder that draws, and prints how long each took and where its picture is.

    python examples/all.py --out out

Ends with exit status 1 if any of them failed.
"""

import subprocess
import sys
import time
from pathlib import Path

import picture

HERE = Path(__file__).parent
EXAMPLES = sorted(path for path in HERE.glob("*.py") if path.stem not in ("all", "multihost", "picture"))


def main(out: Path) -> int:
    failed = []
    for example in EXAMPLES:
        start = time.perf_counter()
        run = subprocess.run([sys.executable, example, "--out", out], capture_output=True, text=True, check=False)
        outcome = str(out / f"{example.stem}.png") if run.returncode == 0 else "FAILED"
        print(f"{example.stem:22}{time.perf_counter() - start:6.1f} s  {outcome}", flush=True)
        if run.returncode != 0:
            failed.append(example.stem)
            print(run.stderr, file=sys.stderr)
    print(f"{len(EXAMPLES) - len(failed)} of {len(EXAMPLES)} examples ran")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(picture.folder(__doc__)))
