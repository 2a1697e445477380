"""Many processes: the numbers of one, and a death among them that costs the steps since the last checkpoint."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).parents[2] / "examples" / "multihost.py"
LEAN = ("--moments", "int8", "--rounding", "residual8")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Job:
    """So many processes of so many devices each; none outlives it."""

    def __init__(self, processes: int, devices: int, *arguments: str, environment: list[dict[str, str]] | None = None):
        command = [
            "timeout",
            "-s",
            "KILL",
            "150",
            sys.executable,
            "-W",
            "error",
            str(SCRIPT),
            "--devices",
            str(devices),
        ]
        if processes > 1 and environment is None:
            command += ["--coordinator", f"127.0.0.1:{free_port()}", "--processes", str(processes)]
        self.running = [
            subprocess.Popen(
                [*command, *(["--process", str(i)] if "--processes" in command else []), *arguments],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
                env=os.environ | (environment[i] if environment else {}),
            )
            for i in range(processes)
        ]

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            assert process.poll() is not None

    def finish(self) -> str:
        """What process 0 printed, once all are done and well."""
        outputs = [process.communicate() for process in self.running]
        assert [process.returncode for process in self.running] == [0] * len(self.running), outputs
        return outputs[0][0]


def run(processes: int, devices: int, folder: Path, *arguments: str) -> tuple[str, np.ndarray]:
    """The output and the final parameters."""
    dump = folder.with_suffix(".npy")
    with Job(processes, devices, "--folder", str(folder), "--dump", str(dump), *arguments) as job:
        return job.finish(), np.load(dump)


def kill_one(folder: Path, *arguments: str) -> int:
    """Kill process 1 of two behind a checkpoint; what step it was of."""
    endless = ("--steps", "1000000", "--save-every", "10", "--heartbeat", "10", "--folder", str(folder))
    with Job(2, 4, *endless, *arguments) as job:
        for line in job.running[0].stdout:
            if "saved" in line:
                break
        os.killpg(job.running[1].pid, signal.SIGKILL)
        job.running[0].communicate(timeout=100)
        assert job.running[0].returncode != 0
    return max(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def test_two_processes_end_where_one_does(tmp_path):
    steps = ("--steps", "20")
    output, alone = run(1, 8, tmp_path / "one", *steps)
    assert "1 processes, 8 devices\n" in output
    state, share = (
        int(n.replace(",", "")) for n in re.search(r"State: ([\d,]+) bytes, .* has ([\d,]+)", output).groups()
    )
    assert state / 8 < share < state / 7.9
    output, together = run(2, 4, tmp_path / "two", *steps)
    assert "2 processes, 8 devices\n" in output
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-5)


def test_a_killed_process_costs_the_steps_since_the_checkpoint(tmp_path):
    last = kill_one(tmp_path / "killed")
    steps = ("--steps", str(last + 20))
    _, expected = run(1, 8, tmp_path / "uninterrupted", *steps)
    for processes, devices in ((1, 2), (2, 2), (4, 1)):
        folder = tmp_path / f"{processes} x {devices}"
        shutil.copytree(tmp_path / "killed", folder)
        output, params = run(processes, devices, folder, *steps)
        assert f"{processes} processes, {processes * devices} devices\nScaleByAdamState: " in output
        assert f"resumed at step {last}\n" in output
        np.testing.assert_allclose(params, expected, rtol=0, atol=1e-5)


def test_lean_state_survives_it_too(tmp_path):
    last = kill_one(tmp_path / "killed", *LEAN)
    steps = ("--steps", str(last + 20), *LEAN)
    _, expected = run(1, 8, tmp_path / "uninterrupted", *steps)
    _, start = run(1, 8, tmp_path / "start", "--steps", "1", *LEAN)
    shutil.copytree(tmp_path / "killed", tmp_path / "resumed")
    output, params = run(2, 2, tmp_path / "resumed", *steps)
    assert f"resumed at step {last}\n" in output
    # A sum over other devices may differ in its last bit, then a code by one, then a weight in its last place.
    assert np.abs(params - expected).mean() < 0.02 * np.abs(expected - start).mean()


LAUNCHERS = {
    "SLURM": lambda i, port: {
        "SLURM_JOB_ID": str(port),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": str(i),
        "SLURM_LOCALID": str(i),
        "SLURM_STEP_NUM_NODES": "1",
    },
    "Open MPI": lambda i, port: {
        "OMPI_MCA_orte_hnp_uri": f"{port * 2**12}.0;tcp://127.0.0.1:34911",
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_RANK": str(i),
        "OMPI_COMM_WORLD_LOCAL_RANK": str(i),
    },
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_launcher_says_who_is_there(launcher, tmp_path):
    """JAX makes the port of the job's number."""
    port = free_port()
    environment = [LAUNCHERS[launcher](i, port) for i in range(2)]
    with Job(2, 2, "--steps", "2", "--folder", str(tmp_path / "run"), environment=environment) as job:
        assert "2 processes, 4 devices\n" in job.finish()


def of_folder(folder: Path) -> list[int]:
    """The processes that train there."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            found += [int(process.name)] if str(folder).encode() in (process / "cmdline").read_bytes() else []
    return found


@pytest.mark.parametrize("processes", [2, 4])
def test_local_starts_the_processes_and_ends_them_all(processes, tmp_path):
    folder = tmp_path / "run"
    command = ["timeout", "-s", "KILL", "100", sys.executable, str(SCRIPT), f"--local={processes}", "--devices", "2"]
    result = subprocess.run([*command, "--steps", "2", "--folder", folder], capture_output=True, text=True, check=False)
    assert f"{processes} processes, {2 * processes} devices\n" in result.stdout
    assert result.returncode == 0
    assert not of_folder(folder)


def test_local_ends_all_where_one_fails_or_it_is_told_to(tmp_path):
    folder = tmp_path / "run"
    command = ["timeout", "-s", "KILL", "100", sys.executable, str(SCRIPT), "--local", "2", "--folder", str(folder)]
    result = subprocess.run([*command, "--devices", "3"], capture_output=True, text=True, check=False)
    assert result.returncode == 1  # six devices do not divide a batch of 256
    assert "256" in result.stderr
    endless = [*command, "--devices", "2", "--steps", "1000000", "--save-every", "10"]
    with subprocess.Popen(endless, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as launcher:
        for line in launcher.stdout:
            if "saved" in line:
                break
        script = min(set(of_folder(folder)) - {launcher.pid})  # behind `timeout`, which forwards to its child
        os.kill(script, signal.SIGTERM)
    assert launcher.returncode == 128 + signal.SIGTERM
    assert not of_folder(folder)


def test_an_open_mpi_that_jax_does_not_know_is_refused(tmp_path):
    environment = [{"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}]
    with Job(1, 2, "--folder", str(tmp_path / "run"), environment=environment) as job:
        _, errors = job.running[0].communicate()
    assert job.running[0].returncode == 1
    assert "JAX does not know this Open MPI: give --coordinator" in errors
