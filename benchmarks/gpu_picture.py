"""The picture of `make gpu`: steps as a roofline, and whole training steps."""

import pathlib
from typing import Any

COLORS = {"optax": "#888888", "torch": "#d08000", "xla": "#3070b0", "native": "#208050"}
TREES = {"leaf": "one leaf of 268M", "gpt2": "GPT-2 small, 148 leaves", "many": "1,000 leaves of 4,096"}


def draw(result: dict[str, Any], path: pathlib.Path) -> None:
    """Draw what there is."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows, training = result["rows"].get("steps", []), result["rows"].get("training", [])
    trees = [tree for tree in TREES if any(row["tree"] == tree for row in rows)]
    count = max(len(trees) + bool(training), 1)
    figure, axes = plt.subplots(1, count, figsize=(4.4 * count, 4.2), squeeze=False)
    for ax, tree in zip(axes[0], trees, strict=False):
        own = [row for row in rows if row["tree"] == tree]
        parameters = own[0]["GB/s"] * own[0]["ms"] * 1e6 / own[0]["bytes"]
        ax.plot([0, 40], [0, 40 * parameters / own[0]["copy GB/s"] / 1e6], "k", lw=1, label="a copy")
        for row in own:
            label = f"{row['engine']}, by {row['way']}"
            seen = label in ax.get_legend_handles_labels()[1]
            marker = "o" if row["way"] == "step" else "^"
            place = row["bytes"], row.get("device ms") or row["ms"]
            ax.plot(*place, marker, color=COLORS[row["engine"]], label=None if seen else label)
        torch = (result.get("torch") or {}).get("rows", {}).get(f"{tree}, float32")
        if torch:
            ax.plot(28, torch["ms"], "s", color=COLORS["torch"], label="torch, fused")
        ax.set(title=TREES[tree], xlabel="bytes moved for a parameter", xlim=(0, 40), ylim=(0, None))
        ax.legend(frameon=False, fontsize=7)
    axes[0][0].set_ylabel("ms on the GPU")
    if training:
        ax, names = axes[0][-1], [f"{row['engine']}: {row['format']}\nby {row['way']}" for row in training]
        ax.barh(range(len(names)), [row["ms"] for row in training], color=[COLORS[row["engine"]] for row in training])
        ax.set_yticks(range(len(names)), names, fontsize=6)
        ax.invert_yaxis()
        ax.set(title="a training step", xlabel="ms")
    figure.suptitle(str(result["machine"].get("name", "")))
    figure.tight_layout()
    figure.savefig(path, dpi=80)
