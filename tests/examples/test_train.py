"""The training example: its files and numbers, Ctrl-C and --resume to the same bits, and what it refuses."""

import json
import math
import re
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

TRAIN = Path(__file__).parents[2] / "examples" / "train"
COMMAND = [sys.executable, "-W", "error", str(TRAIN)]
TIMINGS = {"ms_per_step", "seconds"}


def run(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *options, "--out", str(out)], capture_output=True, text=True, timeout=300, check=False
    )


def interrupt(out: Path, when: str, *options: str, by: signal.Signals = signal.SIGINT) -> tuple[int, str]:
    """Press Ctrl-C, or kill it, once a line of output matches the pattern; the exit code, and all that was written."""
    lines = []
    with subprocess.Popen(
        [*COMMAND, *options, "--out", str(out)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        pressed = False
        for line in process.stdout:
            lines.append(line)
            if not pressed and re.search(when, line):
                process.send_signal(by)
                pressed = True
    assert pressed, "".join(lines)
    return process.returncode, "".join(lines)


def numbers(out: Path) -> Any:
    """All that train.json says, but how long it took."""

    def untimed(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: untimed(item) for key, item in value.items() if key not in TIMINGS}
        return value

    return untimed(json.loads((out / "train.json").read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def main() -> Iterator[Callable[[], int]]:
    """The command's entry, in this process: a refusal takes no time, importing everything does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(TRAIN), *sys.path])
        yield runpy.run_path(str(TRAIN / "__main__.py"), run_name="train")["main"]
    for name in TRAIN.glob("[a-z]*.py"):
        del sys.modules[name.stem]


def refusal(main: Callable[[], int], capsys: pytest.CaptureFixture[str]) -> str:
    """The last line of what the command says when it refuses its options."""
    with pytest.raises(SystemExit) as error:
        main()
    assert error.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_a_short_run_writes_every_file_and_learns(tmp_path: Path):
    result = run(tmp_path, "--epochs", "3", "--steps", "30", "--optimizer", "adamw", "momentum", "adam")
    assert (result.returncode, result.stderr) == (0, "")
    assert all(character.isprintable() or character == "\n" for character in result.stdout)

    pictures = ["curves.png", "confusion.png", "language.png"]
    assert {path.name for path in tmp_path.iterdir()} == {*pictures, "sample.txt", "train.json", "checkpoint"}
    for name in pictures:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
        assert 10_000 < (tmp_path / name).stat().st_size < 200_000

    record = json.loads((tmp_path / "train.json").read_text(encoding="utf-8"))
    assert record.keys() == {"options", "digits", "language", "machine", "versions"}
    assert record["options"] == {
        "task": "all", "epochs": 3, "steps": 30, "optimizer": ["momentum", "adam", "adamw"], "seed": 0
    }  # fmt: skip

    digits = record["digits"]
    assert list(digits) == ["momentum", "adam", "adamw"]
    for name, log in digits.items():
        assert len(log["loss"]) == len(log["test_accuracy"]) == 3
        assert log["loss"][0] > 2 * log["loss"][-1] > 0
        assert 0.85 < log["test_accuracy"][-1] <= 1
        tried = {float(rate): loss for rate, loss in log["validation_loss"].items() if loss is not None}
        assert tried[log["learning_rate"]] == min(tried.values())
        confusion = log["confusion"]
        right, images = sum(confusion[digit][digit] for digit in range(10)), sum(map(sum, confusion))
        assert images == 360
        assert right / images == pytest.approx(log["test_accuracy"][-1])
        assert log["ms_per_step"] > 0
        assert f"{name:>9}" in result.stdout
    parameters = 60 * 128 + 128 + 128 * 64 + 64 + 64 * 10 + 10
    assert digits["momentum"]["state_bytes"] == 4 * parameters
    assert digits["adam"]["state_bytes"] == digits["adamw"]["state_bytes"] == 8 * parameters + 4
    assert digits["adam"]["params_sha256"] != digits["adamw"]["params_sha256"]

    language = record["language"]
    assert len(language["loss"]) == len(language["seconds"]) == 30
    steps, losses = zip(*language["validation"], strict=True)
    assert (steps[0], steps[-1]) == (0, 30)
    assert losses[0] > math.log(100) > 3.3 > losses[-1] > 1
    sample = (tmp_path / "sample.txt").read_text(encoding="utf-8")
    assert language["before"] in sample
    assert language["after"] in sample
    assert language["before"] != language["after"]


@pytest.mark.slow
def test_a_language_model_that_was_interrupted_goes_on_to_the_same_bits(tmp_path: Path):
    options = ["--task", "language", "--steps", "60"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(whole, *options).returncode == 0

    code, output = interrupt(parts, r"^ +15 ", *options)
    assert code == 130
    assert "--resume" in output
    assert "Traceback" not in output
    assert not (parts / "train.json").exists()

    for name, value, was in [("--steps", "61", "60"), ("--seed", "1", "0"), ("--optimizer", "sgd", "sgd momentum")]:
        other = run(parts, *options, "--resume", name, value)
        assert other.returncode == 2
        assert f"{name} is {value}, but the checkpoint" in other.stderr
        assert f"was made with {name} {was}" in other.stderr

    again = run(parts, *options, "--resume")
    assert (again.returncode, again.stderr) == (0, "")
    assert len(numbers(parts)["language"]["loss"]) == 60
    assert numbers(parts) == numbers(whole)
    assert (parts / "sample.txt").read_bytes() == (whole / "sample.txt").read_bytes()


@pytest.mark.slow
def test_digits_that_were_interrupted_go_on_to_the_same_bits(tmp_path: Path):
    options = ["--task", "digits", "--epochs", "4", "--optimizer", "sgd", "adam"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(whole, *options).returncode == 0

    code, output = interrupt(parts, r"^Digits", *options)  # before the first optimizer is done
    assert (code, "sgd      learns" in output) == (130, False)
    code, output = interrupt(parts, r"sgd +learns", *options, "--resume")  # while the second is under way
    assert (code, "adam     learns" in output) == (130, False)

    assert run(parts, *options, "--resume").returncode == 0
    assert numbers(parts) == numbers(whole)

    assert run(parts, *options, "--resume").returncode == 0  # a finished run: only the files are written again
    assert numbers(parts) == numbers(whole)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--steps", "0"], ["--steps", "from 1", "'0'"]),
        (["--epochs", "2.5"], ["--epochs", "whole number", "'2.5'"]),
        (["--seed", "-1"], ["--seed", "from 0", "'-1'"]),
        (["--optimizer", "adam", "lion"], ["--optimizer", "'lion'", "sgd", "adamw"]),
        (["--task", "speech"], ["--task", "'speech'", "digits", "language", "all"]),
        (["--resume"], ["--resume", "no checkpoint"]),
        (["--step", "3"], ["--step"]),
    ],
    ids=lambda value: value[0],
)
def test_bad_options_are_refused_by_name(
    main: Callable[[], int],
    options: list[str],
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setattr(sys, "argv", ["train", *options, "--out", str(tmp_path)])
    message = refusal(main, capsys)
    assert all(word in message for word in words), message
    assert not list(tmp_path.iterdir())


def test_an_output_folder_that_is_a_file_is_refused(
    main: Callable[[], int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "out").write_text("")
    monkeypatch.setattr(sys, "argv", ["train", "--out", str(tmp_path / "out")])
    message = refusal(main, capsys)
    assert "argument --out: must be a folder" in message
    assert repr(str(tmp_path / "out")) in message


@pytest.mark.slow
def test_broken_batches_and_a_kill_leave_no_trace(tmp_path: Path):
    """The parameters at the end are those of a run that saw neither, to the bit."""
    options = ["--task", "language", "--steps", "60"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(whole, *options).returncode == 0

    broken = [*options, "--broken", "7"]
    for when in (r"^ +9 ", r"^ +33 "):
        code, output = interrupt(parts, when, *broken, *(["--resume"] if parts.exists() else []), by=signal.SIGKILL)
        assert code == -signal.SIGKILL, output
    again = run(parts, *broken, "--resume")
    assert (again.returncode, again.stderr) == (0, "")
    assert numbers(parts) == numbers(whole)
