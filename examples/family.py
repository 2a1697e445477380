"""The whole family on the four surfaces of `race.py`: what suits what?

Every optimizer of adamite runs with every learning rate of the race's grid. Its best score, the geometric mean of f
over the steps, is a cell of the table, darker where it is lower. What to learn: on two coordinates momentum decides.
Members that save memory (adam_mini, lion) or serve large models (lamb, stable_adamw) have nothing to gain here, and
RAdam pays for its first steps, which are SGD's, at a learning rate that is Adam's.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import picture
import race

import adamite

MEMBERS = {
    "sgd": adamite.sgd,
    "adagrad": adamite.adagrad,
    "rmsprop": adamite.rmsprop,
    "adam": adamite.adam,
    "nadam": adamite.nadam,
    "amsgrad": adamite.amsgrad,
    "adamax": adamite.adamax,
    "radam": adamite.radam,
    "adabelief": adamite.adabelief,
    "adopt": adamite.adopt,
    "ademamix": adamite.ademamix,
    "laprop": adamite.laprop,
    "adam_atan2": adamite.adam_atan2,
    "adam_mini": adamite.adam_mini,
    "stable_adamw": adamite.stable_adamw,
    "lamb": adamite.lamb,
    "lion": adamite.lion,
}


def main(out: Path) -> None:
    scores = np.empty((len(MEMBERS), len(race.SURFACES)))
    print(f"{'optimizer':14}" + "".join(f"{name:>22}" for name, *_ in race.SURFACES))
    for row, (name, make) in enumerate(MEMBERS.items()):
        cells = []
        for column, (_, surface, start, *_) in enumerate(race.SURFACES):
            learning_rate, score, _ = race.best(surface, make, start)
            scores[row, column] = score
            cells.append(f"{score:12.1e} at {learning_rate:6.2g}")
        print(f"{name:14}" + "".join(cells), flush=True)

    figure, axes = plt.subplots(figsize=(6.4, 5.6))
    relative = np.log10(scores)
    relative = (relative - relative.min(axis=0)) / np.ptp(relative, axis=0)
    axes.imshow(relative, cmap="Blues_r", aspect="auto", vmin=-0.1, vmax=1.3)
    for row, column in np.ndindex(scores.shape):
        color = "white" if relative[row, column] < 0.4 else "black"
        axes.text(column, row, f"{scores[row, column]:.1g}", ha="center", va="center", color=color)
    axes.set_yticks(range(len(MEMBERS)), MEMBERS)
    axes.set_xticks(range(len(race.SURFACES)), [name for name, *_ in race.SURFACES])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(f"geometric mean of f over {race.STEPS} steps, each at its best learning rate (dark: low)")
    picture.save(figure, out / "family.png")


if __name__ == "__main__":
    main(picture.folder(__doc__))
