"""What fewer bytes cost: the figures of `make bench-lean`, drawn.

Each point is one way to keep Adam's moments and the weights, above training a classifier of digits, below a
character language model: how many bytes of weights, gradients and optimizer state it takes for each parameter, and
the loss on held-out data that it ends at (bars: one standard deviation over seeds; gray: float32's). Points at the same
number of bytes stand a little apart.

What to learn: all that is drawn in blue, green or black ends where float32 does, at 6 bytes as at 16. What does not are
bfloat16 weights rounded to the nearest: at the end of a schedule most updates are smaller than half the distance to the
next weight, and lost. optax's plain bfloat16 also rounds its moments so, and loses more.
"""

import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import picture
from matplotlib.axes import Axes

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "lean-cpu.json"
TITLES = {"digits": "digits", "language": "characters"}
COLORS = {
    "float32": picture.COLORS["SGD"],
    "residual8": picture.COLORS["momentum"],
    "stochastic": picture.COLORS["Adagrad"],
    "nearest": picture.COLORS["RMSProp"],
    "bfloat16": picture.COLORS["Adam"],  # optax's
}
MARKERS = {"float32": "o", "bfloat16": "s", "int8": "^", "int8, float8": "v", "optax": "X"}
APART = 0.4  # bytes


def places(rows: list[dict[str, Any]]) -> list[float]:
    """Where to draw each point: at its bytes, or beside the other that is there."""
    sizes = [row["bytes per parameter"] for row in rows]
    together = [[i for i, other in enumerate(sizes) if abs(size - other) < APART] for size in sizes]
    return [
        size + APART * (group.index(i) - (len(group) - 1) / 2)
        for i, (size, group) in enumerate(zip(sizes, together, strict=True))
    ]


def draw(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """Every configuration of one problem: names slant up from those that end well, and lie beside the others."""
    full = rows[0]
    low, high = full["mean"] - full["standard deviation"], full["mean"] + full["standard deviation"]
    axes.axhspan(low, high, color=picture.GRAY, alpha=0.2, linewidth=0)
    middle = (full["mean"] + max(row["mean"] for row in rows)) / 2
    good, bad = ([row for row in rows if (row["mean"] < middle) == well] for well in (True, False))
    top = max(row["mean"] + row["standard deviation"] for row in good)
    for group in (good, bad):
        for x, row in zip(places(group), group, strict=True):
            y, color = row["mean"], COLORS[row["weights"]]
            marker = MARKERS[row["moments"]]
            axes.errorbar(x, y, row["standard deviation"], fmt=marker, color=color, markersize=5, elinewidth=1)
            name = "optax, plain bfloat16" if row["moments"] == "optax" else f"{row['moments']} + {row['weights']}"
            if group is bad:
                picture.label(axes, x, y, name, color, dx=6)
            else:
                axes.annotate(
                    name, (x, top), (2, 3), textcoords="offset points", color=color, rotation=35, rotation_mode="anchor"
                )


def main(out: Path) -> None:
    """Draw, and print what the picture shows."""
    result = json.loads(RESULTS.read_text())
    figure, panels = plt.subplots(2, 1, figsize=(9, 7.4), sharex=True)
    for axes, (problem, figures) in zip(panels, result["problems"].items(), strict=True):
        rows = figures["configurations"]
        draw(axes, rows)
        axes.set(
            title=f"{TITLES[problem]}, {figures['parameters']:,} parameters", ylabel="loss on held-out data (nats)"
        )
        recommended = [row for row in rows if row["recommended"]]
        furthest = max(abs(row["difference in float32's standard deviations"]) for row in recommended)
        plain = rows[-1]["difference in float32's standard deviations"]
        print(
            f"{problem}: furthest recommended pair {furthest:.2f}, optax's plain bfloat16 {plain:.2f} deviations away"
        )
    panels[1].set(xlabel="bytes per parameter: weights, gradients, optimizer state", xlim=(5.7, 17.5))
    picture.save(figure, out / "memory.png")


if __name__ == "__main__":
    main(picture.folder(__doc__))
