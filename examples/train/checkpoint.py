"""How can a run be stopped at any moment and go on later, bit for bit?

A run is two things: its record, numbers and words that end up in train.json, and the arrays that training is at, which
are parameters and optimizer state as they come, Optax' own state classes included. Both are saved together or not at
all, so that a process may be killed at any moment. Ctrl-C only raises a flag; training looks at it in `pause`, between
two steps, so that no step is ever half done.
"""

import shutil
import signal
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import orbax.checkpoint as ocp

from adamite import checkpoint


class InterruptError(Exception):
    """Ctrl-C was pressed, and what the run knows is saved."""


class ResumeError(Exception):
    """There is nothing to go on from, or it was made with other options."""


class Run:
    """A run that keeps its checkpoint in a folder. Use it as a context: there, Ctrl-C is a flag.

    Args:
        folder: where the checkpoint is. What another run left there goes, unless `resume`.
        options: what the results depend on; a run goes on only with those that it began with.
        resume: go on from the checkpoint.

    Raises:
        ResumeError: `resume`, but there is no checkpoint, or its options differ.
    """

    def __init__(self, folder: Path, options: dict[str, Any], *, resume: bool) -> None:
        if not resume:
            shutil.rmtree(folder, ignore_errors=True)
        elif not folder.is_dir():
            raise ResumeError(f"--resume: there is no checkpoint in {folder}")
        self.record: dict[str, Any] = {"options": options}
        self._interrupted = False
        options_of_saving = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
        self._manager = checkpoint.manager(folder, options_of_saving)
        if resume:
            self.record = self._load(folder)
            for name, began_with in self.record["options"].items():
                if options[name] != began_with:
                    raise ResumeError(
                        f"--{name} is {_words(options[name])}, but the checkpoint in {folder} was made with "
                        f"--{name} {_words(began_with)}: give that to go on, or leave --resume out to start over"
                    )

    def __enter__(self) -> Self:
        def interrupt(*_: Any) -> None:
            self._interrupted = True

        self._before = signal.signal(signal.SIGINT, interrupt)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGINT, self._before)
        self._manager.close()

    def pause(self, arrays: Any = (), optimizer: Any = None, *, save: bool = False) -> None:
        """Call between two steps, with what `arrays` should give back: saves if asked to, or if Ctrl-C was pressed.

        Raises:
            InterruptError: Ctrl-C was pressed.
        """
        if save or self._interrupted:
            number = (self._manager.latest_step() or 0) + 1
            checkpoint.save(self._manager, number, arrays, optimizer, record=self.record)
        if self._interrupted:
            raise InterruptError

    def arrays(self, like: Any, optimizer: Any) -> Any:
        """The arrays of the last save, as a tree like this one: its classes, shapes, dtypes and placement."""
        return checkpoint.restore(self._manager, like, optimizer).tree

    def _load(self, folder: Path) -> dict[str, Any]:
        if self._manager.latest_step() is None:
            raise ResumeError(f"--resume: there is no checkpoint in {folder}")
        try:
            return checkpoint.read_manifest(self._manager).record
        except checkpoint.RefusedError as error:
            raise ResumeError(f"--resume: {error}") from None


def _words(value: Any) -> str:
    return " ".join(value) if isinstance(value, list) else str(value)
