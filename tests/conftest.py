"""Hypothesis without a clock; and which tests `make test` runs.

Of a test that is marked ``few(n)`` it runs n cases, evenly spaced. The others are marked ``more``: `make test-more`
runs them.
"""

import itertools

import hypothesis
import pytest

collect_ignore = ["parity_torch.py", "fixtures", "engines/tpu_compiler.py"]  # run by name only

hypothesis.settings.register_profile("adamite", deadline=None, derandomize=True, max_examples=40)
hypothesis.settings.load_profile("adamite")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is left to `make test-more`."""
    for _, group in itertools.groupby(items, key=lambda item: item.nodeid.split("[")[0]):
        cases = [item for item in group if not item.get_closest_marker("slow")]
        few = cases[0].get_closest_marker("few") if cases else None
        if few:
            count = min(few.args[0], len(cases))
            taken = {k * len(cases) // count for k in range(count)}
            for k, item in enumerate(cases):
                if k not in taken:
                    item.add_marker(pytest.mark.more)
