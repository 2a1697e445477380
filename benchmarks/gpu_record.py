"""What `make gpu` has found so far: a JSON file, written after each item, so that nothing is lost with a process.

An item is what may fail alone. A process that dies in one, by a fault of the GPU or because it hangs, is followed by
another (see `gpu.py`), which leaves out what was done and what died.
"""

import faulthandler
import json
import os
import pathlib
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

LONGEST = 60.0
"""Seconds that the start of no item may lie behind."""
BROKEN = 4
"""How a process ends whose GPU works no more."""


class Record:
    """The results, their file, and the time that is left.

    Attributes:
        result: what is written.
        emulated: whether the GPU is emulated.
        threads: how many items may run at the same time.
    """

    def __init__(self, path: pathlib.Path, start: float, budget: float, *, emulated: bool, threads: int) -> None:
        """Of a file, which may hold what an earlier process found; seconds are `time.time`'s."""
        self.path, self.start, self.budget = path, start, budget
        self.emulated, self.threads = emulated, threads
        empty: dict[str, Any] = {"failures": [], "left out": [], "done": [], "doing": [], "rows": {}}
        self.result = json.loads(path.read_text()) if path.exists() else empty
        self.lock = threading.RLock()

    def seconds(self) -> float:
        """Since the start."""
        return time.time() - self.start

    def left(self, share: float = 1.0) -> float:
        """Seconds until this share of the budget is spent."""
        return share * self.budget - self.seconds()

    def say(self, text: str) -> None:
        """Print it, and when."""
        with self.lock:
            print(f"[{self.seconds():6.1f}] {text}", flush=True)

    def save(self) -> None:
        """Write the file; a kill leaves the old one or the new one."""
        with self.lock:
            self.result["seconds"] = round(self.seconds(), 1)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            new = self.path.with_suffix(".new")
            new.write_text(json.dumps(self.result, indent=1, default=str) + "\n")
            os.replace(new, self.path)

    def set(self, name: str, value: Any) -> None:
        """Keep what there is one of."""
        with self.lock:
            self.result[name] = value
        self.save()

    def attempt(
        self, part: str, name: str, make: Callable[[], dict[str, Any]], *, share: float = 1.0, needs: float = 4.0
    ) -> dict[str, Any] | None:
        """A row of a part; None: it failed, was there already, or too little time is left.

        Args:
            part: where the row belongs.
            name: of the item.
            make: makes the row.
            share: of the budget, that is spent when the part ends.
            needs: seconds that must be left to begin.
        """
        key = f"{part}: {name}"
        with self.lock:
            if key in self.result["done"]:
                return None
            if self.left(share) < needs:
                if key not in self.result["left out"]:
                    self.result["left out"].append(key)
                return None
            self.result["left out"] = [x for x in self.result["left out"] if x != key]
            self.result["doing"].append(key)
        self.save()
        faulthandler.dump_traceback_later(LONGEST if not self.emulated else 600, exit=True)
        row, began, well = None, time.time(), True
        try:
            row = {"name": name, **make(), "seconds": round(time.time() - began, 2)}
        except Exception as error:
            well = self._is_well()
            self.failed(key, repr(error), traceback.format_exc())
            if not well and self.threads > 1:
                self._end("the GPU works no more: another process tries the items one by one")
        with self.lock:
            if row is not None:
                self.result["rows"].setdefault(part, []).append(row)
            self.result["doing"].remove(key)
            self.result["done"].append(key)
            if not self.result["doing"]:
                faulthandler.cancel_dump_traceback_later()
        self.save()
        if not well:
            self._end("the GPU works no more: another process goes on")
        return row

    def failed(self, key: str, error: str, trace: str = "") -> None:
        """Keep what went wrong."""
        with self.lock:
            self.result["failures"].append({"item": key, "error": error[:2000], "traceback": trace[-6000:]})
        self.say(f"FAILED {key}: {error[:700]}")

    def _end(self, why: str) -> None:
        self.say(why)
        self.save()
        sys.stdout.flush()
        os._exit(BROKEN)

    def _is_well(self) -> bool:
        """Whether a process can go on after a failure: a kernel that reads elsewhere leaves it without a GPU."""
        import jax.numpy as jnp

        try:
            return float(jnp.arange(3.0).sum()) == 3.0
        except Exception:
            return False
