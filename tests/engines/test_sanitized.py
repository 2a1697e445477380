"""The compiled kernels again, built with the sanitizers for addresses and undefined behaviour."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="its libraries are found by g++")
def test_every_test_of_the_kernels_of_adamw(tmp_path):
    build, package = tmp_path / "build", tmp_path / "adamite_native"
    path = f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {"PATH": path}
    options = ["SANITIZE=ON", "HERE=ON", "ONLY=adamw"]
    configure = ["cmake", "-S", ROOT / "native", "-B", build, "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}"]
    subprocess.run([*configure, *(f"-DADAMITE_{x}" for x in options)], env=environment, check=True)
    subprocess.run(["cmake", "--build", build], env=environment, check=True)
    shutil.copytree(ROOT / "native" / "src" / "adamite_native", package)
    shutil.copy(build / "_native.so", package)
    shutil.copy(build / "generated" / "kernels.json", package)

    found = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    environment |= {"LD_PRELOAD": " ".join(found), "ASAN_OPTIONS": "detect_leaks=0", "PYTHONPATH": str(tmp_path)}
    tests = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not rules"]
    tests += [f"tests/engines/{name}.py" for name in ("test_native", "test_gpu_handler")]
    result = subprocess.run(
        [sys.executable, *tests], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert "runtime error" not in result.stderr
