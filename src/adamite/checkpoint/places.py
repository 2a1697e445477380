"""Places in a tree, as errors name them: ``tree[0]['head']`` is one, ``['head']`` is wherever a path has these keys.

A parameter, its moments and its residual stand at several places of a tree, under the same keys. What follows a place
in their paths is the same, but for the fields in which a moment is kept.
"""

import re
from collections.abc import Callable, Iterable

from adamite.convert_weights import KEY, keys

FIELDS = (".codes", ".scales", ".inner")
"""Of the states in which a moment is kept otherwise than in float32."""


def is_place(name: str) -> bool:
    """Whether it names a place: one below the tree's root, or keys of which the first is no number."""
    rest = keys(name.removeprefix("tree"))
    named = name.startswith("tree") or not (rest and re.fullmatch(r"\[\d+\]", rest[0]))
    return bool(rest) and named and all(KEY.fullmatch(key) for key in rest)


def under(places: Iterable[str], path: str) -> set[tuple[str, tuple[str, ...]]]:
    """The places that a path is under, each with the keys that follow it there. The path begins with "tree"."""
    mine, found = keys(path.removeprefix("tree")), set()
    for name in places:
        place = keys(name.removeprefix("tree"))
        starts = range(1 if name.startswith("tree") else len(mine) - len(place) + 1)
        for end in (start + len(place) for start in starts if mine[start : start + len(place)] == place):
            found.add((name, tuple(key for key in mine[end:] if key not in FIELDS)))
    return found


def touched(places: Iterable[str], differing: Iterable[str]) -> Callable[[str], bool]:
    """Whether a path belongs to a parameter of which any path, under one of the places, differs."""
    places = [*places]
    parameters = {one for path in differing for one in under(places, path)} if places else set()
    return lambda path: bool(parameters) and not parameters.isdisjoint(under(places, path))
