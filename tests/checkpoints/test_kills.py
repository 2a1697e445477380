"""`kills.py`, as a test."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.more


@pytest.mark.parametrize("kills", [25, pytest.param(200, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_again_and_again_ends_at_the_same_bits(kills):
    command = [sys.executable, str(Path(__file__).with_name("kills.py")), str(kills)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1500)
    print(result.stdout)
    assert result.returncode == 0, result.stderr
    assert f"{kills} kills" in result.stdout
    assert "the same bits: True" in result.stdout
