"""The loss-parity benchmark: what it writes, and what its committed figures show."""

import json
import math
import pathlib
import statistics
import subprocess
import sys
from typing import Any

import pytest

FOLDER = pathlib.Path(__file__).parent.parent / "benchmarks"
COMMITTED = json.loads((FOLDER / "results/lean-cpu.json").read_text())
PROBLEMS = ("digits", "language")


def rows(result: dict[str, Any], problem: str) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["moments"], row["weights"]): row for row in result["problems"][problem]["configurations"]}


def assert_is_a_result(result: dict[str, Any]) -> None:
    """The keys are there, and means, deviations and differences are those of the losses."""
    assert {"jax", "adamite", "optax"} <= result["machine"]["versions"].keys()
    assert result["problems"].keys() == set(PROBLEMS)
    assert result["problems"]["language"]["parameters"] >= 10**6
    for problem in PROBLEMS:
        table = rows(result, problem)
        reference = table["float32", "float32"]["losses"]
        deviation = statistics.stdev(reference)
        for row in table.values():
            losses = row["losses"]
            assert len(losses) == result["seeds"]
            assert all(0 < loss < 10 for loss in losses)
            assert row["ms per step"] > 0
            assert row["mean"] == pytest.approx(sum(losses) / len(losses), rel=1e-9)
            paired = [a - b for a, b in zip(losses, reference, strict=True)]
            mean = sum(paired) / len(paired)
            error = math.sqrt(sum((d - mean) ** 2 for d in paired) / (len(paired) - 1) / len(paired))
            assert row["standard deviation"] == pytest.approx(statistics.stdev(losses), rel=1e-9)
            assert row["difference"] == pytest.approx(mean, abs=1e-12)
            assert row["standard error of the difference"] == pytest.approx(error, abs=1e-12)
            assert row["difference in float32's standard deviations"] == pytest.approx(mean / deviation, abs=1e-9)


@pytest.mark.slow
def test_quick_run_writes_the_same_form(tmp_path):
    out = tmp_path / "lean.json"
    command = [sys.executable, "-W", "error", str(FOLDER / "lean.py"), "--quick", "--out", str(out)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert run.returncode == 0, run.stderr
    result = json.loads(out.read_text())
    assert_is_a_result(result)
    assert result.keys() == COMMITTED.keys()
    for problem in PROBLEMS:
        quick, committed = rows(result, problem), rows(COMMITTED, problem)
        assert len(quick) == 4
        assert len({tuple(row["losses"]) for row in quick.values()}) == 4  # each is its own configuration
        for pair, row in quick.items():
            assert row.keys() == committed[pair].keys()
            assert row["bytes per parameter"] == committed[pair]["bytes per parameter"]


def test_committed_figures_are_of_the_whole_grid():
    assert_is_a_result(COMMITTED)
    assert COMMITTED["seeds"] >= 5
    assert COMMITTED["steps"] >= 2000
    grid = {(m, w) for m in ("float32", "bfloat16", "int8") for w in ("float32", "nearest", "stochastic", "residual8")}
    for problem in PROBLEMS:
        assert rows(COMMITTED, problem).keys() == grid | {("int8, float8", "residual8"), ("optax", "bfloat16")}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_every_recommended_pair_ends_at_the_loss_of_float32(problem):
    table = rows(COMMITTED, problem)
    recommended = {pair for pair, row in table.items() if row["recommended"]}
    assert recommended == {(m, w) for m in ("bfloat16", "int8") for w in ("float32", "stochastic", "residual8")}
    deviation = table["float32", "float32"]["standard deviation"]
    for pair in recommended:
        assert abs(table[pair]["difference"]) <= deviation, pair
    for pair in [("optax", "bfloat16"), ("float32", "nearest")]:
        assert table[pair]["difference"] > 3 * deviation, pair


def test_bytes_of_the_language_model():
    table = rows(COMMITTED, "language")
    bytes_of = {pair: row["bytes per parameter"] for pair, row in table.items()}
    assert bytes_of["float32", "float32"] == pytest.approx(16, abs=1e-4)  # and two counts
    assert bytes_of["bfloat16", "stochastic"] == pytest.approx(8, abs=1e-4)
    assert bytes_of["int8", "residual8"] <= 7.2
    assert bytes_of["int8", "stochastic"] <= 6.2
