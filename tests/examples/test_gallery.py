"""Every picture of examples/ is drawn, and what each example claims is what it prints."""

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

pytestmark = pytest.mark.more

FOLDER = Path(__file__).parents[2] / "examples"
SLOW = {"family", "bias_correction", "race", "anatomy", "formats", "gradient_protection"}
SLOW |= {"optax_pipeline", "equinox_loop", "flax_linen", "plain_jax", "dashboard", "regularization", "pmap_eight"}


def number(output: str, before: str) -> float:
    """The first number after `before`, a regular expression."""
    found = re.search(before + r"\s*([-+]?\d[\d.]*(?:e[-+]?\d+)?)", output)
    assert found, f"no number after {before!r} in:\n{output}"
    return float(found[1])


def race(output: str) -> None:
    rows = re.findall(r"^\w+ +(\w+) +\S+ +(\S+) +(\S+) +(\S+)$", output, flags=re.MULTILINE)
    assert len(rows) == 4 * 6
    for _, start, mean, end in rows:
        assert float(end) < float(start)
        assert float(mean) < float(start)
    scores = [{optimizer: float(mean) for optimizer, _, mean, _ in rows[i : i + 6]} for i in range(0, 24, 6)]
    ravine = sorted(scores[2], key=lambda optimizer: scores[2][optimizer])
    assert set(ravine[:3]) == {"NAdam", "Adam", "momentum"}
    assert ravine[-1] == "RMSProp"


def anatomy(output: str) -> None:
    assert number(output, "difference from adamite.scale_by_adam:") < 1e-6
    before, after = number(output, r"mean \|u\| before the jump:"), number(output, r"mean \|u\| after the fall:")
    peak = number(output, r"largest \|u\| after the jump:")
    assert 3 * after < before < peak / 2
    assert 1 < peak < number(output, "never above") == 7.27


def bias_correction(output: str) -> None:
    assert number(output, "first update, uncorrected / corrected:") == number(output, "theory") == 3.162
    assert number(output, "largest ratio:") == 6.57
    assert number(output, "at step") == 12
    small, large = output.index("learning rate 0.001"), output.index("learning rate 0.1 ")
    assert number(output[small:], "uncorrected") < number(output[small:], ": corrected")
    assert number(output[large:], ": corrected") < 0.3 < 1.5 < number(output[large:], "uncorrected")


def regularization(output: str) -> None:
    assert number(output, "L2 in the loss: largest difference from ridge:") < 1e-5
    assert number(output, "L1 in the loss: largest difference from Lasso:") < 1e-3
    assert number(output, r"decoupled decay: largest difference from ridge with s sqrt\(v\):") < 0.03


def dashboard(output: str) -> None:
    assert number(output, "left out before step 200:") == 0
    assert number(output, "with it:") == 1
    assert number(output, "with step 400:") == 2
    assert number(output, "first step") > 2
    assert number(output, "last fifty") < 0.05
    assert number(output, "gradient norm at step 400:") > 100


def pmap_eight(output: str) -> None:
    assert "devices: 8," in output
    assert "replicas identical to the bit: True" in output
    assert number(output, "mu: largest difference from one device") <= 1e-6
    assert number(output, "nu: largest difference from one device") <= 1e-6
    assert number(output, "last step") < number(output, "first step") / 4


def optax_pipeline(output: str) -> None:
    assert number(output, "mini-batches:") == 4 * number(output, "updates:") == 4 * number(output, "Adam's count:")
    assert 0 < number(output, "clipped:") < 100
    assert number(output, "largest norm after:") == 0.5
    assert number(output, "last 10 updates") < number(output, "first update") / 10
    assert number(output, "test accuracy:") > 0.95


def gradient_protection(output: str) -> None:
    assert "eps_root = 0: 0 of 49 meta-gradients are finite" in output
    assert "eps_root = 1e-12: 49 of 49 meta-gradients are finite" in output
    right = number(output, "difference from finite differences:")
    assert right < 0.03
    assert number(output, "difference with stop_gradient:") > 5 * right


def classifier(output: str) -> None:
    assert number(output, "last epoch") < 0.08
    assert number(output, "test accuracy:") > 0.94


def family(output: str) -> None:
    rows = [line.split() for line in output.splitlines() if " at " in line]
    scores = {row[0]: [float(row[1 + 3 * column]) for column in range(4)] for row in rows}
    assert len(scores) >= 17
    assert all(score < 10 for row in scores.values() for score in row)
    assert all(a < b for a, b in zip(scores["nadam"], scores["adam"], strict=True))


def memory(output: str) -> None:
    for problem in ("digits", "language"):
        furthest = number(output, f"{problem}: furthest recommended pair")
        plain = number(output, f"{problem}: .* optax's plain bfloat16")
        assert furthest <= 1 < 3 < plain


def formats(output: str) -> None:
    def error(name: str, size: str) -> float:
        return number(output, f"{name} [^\n]*error at {size}:")

    assert error("bfloat16", "0.0001") < 0.004
    assert error("int8, v", "0.1") < error("int8, v", "0.0001") < 0.2
    assert error("float8, v", "0.0001") < 0.03


CLAIMS: dict[str, Callable[[str], None]] = {
    "anatomy": anatomy,
    "bias_correction": bias_correction,
    "dashboard": dashboard,
    "equinox_loop": classifier,
    "family": family,
    "flax_linen": classifier,
    "flax_nnx": classifier,
    "formats": formats,
    "gradient_protection": gradient_protection,
    "memory": memory,
    "optax_pipeline": optax_pipeline,
    "plain_jax": classifier,
    "pmap_eight": pmap_eight,
    "race": race,
    "regularization": regularization,
}


def test_every_example_has_a_claim() -> None:
    assert {path.stem for path in FOLDER.glob("*.py")} == CLAIMS.keys() | {"all", "multihost", "picture"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in CLAIMS]
)
def test_example(name: str, tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", str(FOLDER / f"{name}.py"), "--out", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert run.returncode == 0, run.stderr
    CLAIMS[name](run.stdout)

    path = tmp_path / f"{name}.png"
    assert path.stat().st_size < 200_000
    with Image.open(path) as image:
        assert image.format == "PNG"
        image.load()
        assert min(image.size) > 300
        assert len(image.convert("RGB").getcolors(1 << 24) or []) > 10  # not a blank page


def test_all_names_what_failed(tmp_path: Path) -> None:
    for name in ("all", "picture"):
        shutil.copy(FOLDER / f"{name}.py", tmp_path)
    (tmp_path / "good.py").write_text("print('well')")
    (tmp_path / "bad.py").write_text("raise SystemExit('unwell')")
    command = [sys.executable, str(tmp_path / "all.py"), "--out", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert run.returncode == 1
    assert re.search(r"^bad .* FAILED$", run.stdout, flags=re.MULTILINE)
    assert "1 of 2 examples ran" in run.stdout
    assert "unwell" in run.stderr
