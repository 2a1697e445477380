"""What do the numbers look like? Each function draws one picture from the record of a run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm

# Okabe & Ito 2008: told apart by colour-blind readers, too; the dashes tell neighbours apart in print.
STYLES: dict[str, tuple[str, Any]] = {
    "sgd": ("#404040", "-"),
    "momentum": ("#0072B2", "-"),
    "adagrad": ("#009E73", "-"),
    "rmsprop": ("#E69F00", "-"),
    "adam": ("#D55E00", "-"),
    "adamw": ("#CC79A7", (0, (4, 2))),
}
GRAY = "#707070"

mpl.use("agg")
plt.rcParams.update(
    {
        "figure.dpi": 120,
        "figure.constrained_layout.use": True,
        "font.size": 9,
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
)


def draw_curves(digits: dict[str, Any], path: Path) -> None:
    """Loss and accuracy of every optimizer, epoch by epoch."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2))
    panels = [(left, "loss", 1.0, "Training loss"), (right, "test_accuracy", 100.0, "Test accuracy")]
    for axes, key, scale, title in panels:
        curves = {name: scale * np.array(log[key]) for name, log in digits.items()}
        for name, values in curves.items():
            color, dashes = STYLES[name]
            axes.plot(
                np.arange(1, len(values) + 1), values, color=color, linestyle=dashes, marker="." * (len(values) == 1)
            )
        axes.set(title=title, xlabel="epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        labels = {name: name for name in curves}
        if key == "loss":
            labels = {name: f"{name}, {log['learning_rate']:g}" for name, log in digits.items()}
            axes.set(ylabel="cross-entropy (nats per image)", yscale="log")
            axes.yaxis.set_major_formatter("{x:g}")
        else:
            lowest = min(values.min() for values in curves.values())
            axes.set(ylabel="correct test images (%)", ylim=(max(lowest, 80.0) - 1 if lowest < 100 else None, 100))
        label_ends(axes, curves, labels)
    figure.suptitle(
        "The same network, data and dropout; each optimizer at its best learning rate (left, after its name)",
        x=0.01,
        ha="left",
    )
    figure.savefig(path)
    plt.close(figure)


def label_ends(axes: Axes, curves: dict[str, np.ndarray], labels: dict[str, str]) -> None:
    """Label each curve at its right end, labels pushed apart where ends meet."""
    axes.figure.canvas.draw()
    to_axes = axes.transData + axes.transAxes.inverted()
    ends = {name: tuple(to_axes.transform((len(values), values[-1]))) for name, values in curves.items()}
    names = sorted(ends, key=lambda name: ends[name][1])
    heights = spread([ends[name][1] for name in names], gap=0.06)
    for name, height in zip(names, heights, strict=True):
        axes.annotate(
            labels[name],
            ends[name],
            (1.06, height),
            "axes fraction",
            "axes fraction",
            color=STYLES[name][0],
            va="center",
            arrowprops={"arrowstyle": "-", "color": STYLES[name][0], "lw": 0.6, "relpos": (0, 0.5), "shrinkA": 1},
        )


def spread(heights: Sequence[float], gap: float) -> np.ndarray:
    """Ascending heights moved as little as puts `gap` between neighbours, their mean kept."""
    apart = np.array(heights)
    for _ in range(200):
        overlap = np.maximum(gap - np.diff(apart), 0) / 2
        apart[:-1] -= overlap
        apart[1:] += overlap
    return apart


def draw_confusion(name: str, log: dict[str, Any], path: Path) -> None:
    """Which digit is taken for which."""
    counts = np.array(log["confusion"])
    figure, axes = plt.subplots(figsize=(5, 4.6))
    axes.imshow(counts, cmap="Blues", norm=PowerNorm(0.4, 0, counts.max()))
    for (row, column), count in np.ndenumerate(counts):
        if count:
            axes.text(column, row, str(count), ha="center", va="center", color="white" if row == column else "black")
    accuracy = np.trace(counts) / counts.sum()
    axes.set(
        title=f"{name}: {np.trace(counts)} of {counts.sum()} test images recognized ({accuracy:.1%})",
        xlabel="digit that the network sees",
        ylabel="digit that was written",
        xticks=range(10),
        yticks=range(10),
    )
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    figure.savefig(path)
    plt.close(figure)


def draw_language(log: dict[str, Any], path: Path) -> None:
    """The language model's loss, step by step and held out."""
    loss, validation = np.array(log["loss"]), np.array(log["validation"])
    figure, axes = plt.subplots(figsize=(7, 4.2))
    axes.plot(np.arange(1, len(loss) + 1), loss, color="#56B4E9", lw=0.8, marker="." * (len(loss) == 1))
    axes.plot(*validation.T, color="#D55E00", lw=1.8, marker=".")
    axes.axhline(log["frequency_loss"], color=GRAY, lw=0.8, ls="--")
    axes.text(
        len(loss), log["frequency_loss"] + 0.04, "knowing only how frequent each character is", ha="right", color=GRAY
    )
    axes.annotate(
        f"held out: {validation[-1, 1]:.2f}",
        validation[-1],
        (0, 14),
        textcoords="offset points",
        color="#D55E00",
        ha="right",
    )
    axes.annotate("minibatch", (1, loss[0]), (10, 0), textcoords="offset points", color="#0072B2")
    axes.set(
        title="A transformer of 2 layers learns to write, one character at a time",
        xlabel="step",
        ylabel="cross-entropy (nats per character)",
    )
    figure.savefig(path)
    plt.close(figure)
