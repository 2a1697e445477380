"""torch's fused AdamW and a copy, in a process of its own: prints one line of JSON.

It runs before JAX, which takes most of the GPU's memory.
"""

import argparse
import json
import statistics
import time
from typing import Any

import torch  # pyright: ignore[reportMissingImports]  # not a requirement: it is timed where it is
from gpu_trees import trees


def timed(run: Any, wait: Any, steps: int) -> float:
    """Milliseconds of a run: the median of seven rows of them."""
    for _ in range(3):
        run()
    times = []
    for _ in range(7):
        wait()
        start = time.perf_counter()
        for _ in range(steps):
            run()
        wait()
        times.append(1e3 * (time.perf_counter() - start) / steps)
    return statistics.median(times)


def step_of(shapes: list[tuple[int, ...]], device: str, dtype: Any) -> Any:
    params = [torch.zeros(shape, device=device, dtype=dtype, requires_grad=True) for shape in shapes]
    for p in params:
        p.grad = torch.randn_like(p) * 1e-2
    return torch.optim.AdamW(params, lr=3e-4, weight_decay=0.1, fused=True).step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="on the CPU")
    tiny = parser.parse_args().tiny
    device, steps = ("cpu", 1) if tiny else ("cuda", 10)
    wait = (lambda: None) if tiny else torch.cuda.synchronize
    found: dict[str, Any] = {"version": torch.__version__, "cuda": torch.version.cuda, "rows": {}}
    for tree, shapes in trees(tiny).items():
        for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
            run = step_of(shapes, device, dtype)
            ms = timed(run, wait, steps)
            moved = 7 * size * sum(torch.Size(shape).numel() for shape in shapes)
            found["rows"][f"{tree}, {str(dtype)[6:]}"] = {"ms": ms, "GB/s": moved / ms / 1e6}
    x = torch.ones(2**16 if tiny else 2**28, device=device)
    y = torch.empty_like(x)
    found["copy GB/s"] = 8 * x.numel() / timed(lambda: y.copy_(x), wait, steps) / 1e6
    print(json.dumps(found))


if __name__ == "__main__":
    main()
