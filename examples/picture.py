"""The gallery's house style: colours that colour-blind readers can tell apart (Okabe & Ito 2008), and quiet axes."""

import argparse
import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

COLORS = {
    "Adam": "#D55E00",
    "NAdam": "#CC79A7",
    "RMSProp": "#E69F00",
    "Adagrad": "#009E73",
    "momentum": "#0072B2",
    "SGD": "#404040",
}
GRAY = "#808080"

matplotlib.use("agg")
plt.rcParams.update(
    {
        "figure.dpi": 140,
        "figure.constrained_layout.use": True,
        "font.size": 9,
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
        "axes.labelcolor": "#404040",
        "axes.edgecolor": GRAY,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "xtick.color": "#404040",
        "ytick.color": "#404040",
        "lines.linewidth": 1.5,
        "lines.solid_capstyle": "round",
    }
)


def folder(description: str | None) -> Path:
    """Where to draw: the folder `out`, or the one that the command line names with `--out`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out"), metavar="DIR", help="folder of the picture (out)")
    return parser.parse_args().out


def save(figure: Figure, path: Path) -> None:
    """Write the figure in 128 colours, a third of the bytes; make the folder if there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = io.BytesIO()
    figure.savefig(pixels)
    Image.open(pixels).convert("RGB").quantize(128).save(path, optimize=True)
    print(f"picture: {path}")


def label(axes: Axes, x: float, y: float, text: str, color: str, *, dx: float = 4, dy: float = 0) -> None:
    """Write `text` next to the point (x, y), `dx` and `dy` points away: to the right of it, or left if `dx` < 0."""
    side = "left" if dx >= 0 else "right"
    axes.annotate(text, (x, y), (dx, dy), textcoords="offset points", color=color, ha=side, va="center")


def training(title: str, losses: Sequence[float], accuracies: Sequence[float], path: Path) -> None:
    """Draw a training run: the loss of every step with its mean over epochs, the test accuracy after every epoch."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 2.9))
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    per_epoch = len(losses) // len(accuracies)
    epochs = np.arange(1, len(accuracies) + 1)
    means = np.asarray(losses[: per_epoch * len(epochs)]).reshape(len(epochs), per_epoch).mean(axis=1)
    left.plot(np.arange(1, len(losses) + 1) / per_epoch, losses, color=COLORS["Adam"], alpha=0.3, linewidth=0.8)
    left.plot(epochs - 0.5, means, color=COLORS["Adam"])
    left.set(yscale="log", xlabel="epoch", title="training loss (nats)")
    right.plot(epochs, 100 * np.asarray(accuracies), ".-", color=COLORS["momentum"])
    right.set(xlabel="epoch", title="test accuracy (%)", ylim=(min(90, 100 * min(accuracies)), 100))
    label(right, epochs[-1], 100 * accuracies[-1], f"{100 * accuracies[-1]:.1f}", COLORS["momentum"])
    save(figure, path)
