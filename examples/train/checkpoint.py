"""How can a run be stopped at any moment and go on later, bit for bit?

A run is two things: its record, numbers and words that end up in train.json, and the arrays that training is at, which
are parameters and optimizer state as they come, Optax' own state classes included. Both are saved together or not at
all. Ctrl-C only raises a flag; training looks at it in `pause`, between two steps, so that no step is ever half done.
"""

import shutil
import signal
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import orbax.checkpoint as ocp


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
        self._manager = ocp.CheckpointManager(
            folder.absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
        )
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

    def pause(self, arrays: Any = None, *, save: bool = False) -> None:
        """Call between two steps, with what `arrays` should give back: saves if asked to, or if Ctrl-C was pressed.

        Raises:
            InterruptError: Ctrl-C was pressed.
        """
        if save or self._interrupted:
            items: dict[str, Any] = {"record": ocp.args.JsonSave(self.record)}
            if arrays is not None:
                items["arrays"] = ocp.args.StandardSave(arrays)
            self._manager.save((self._manager.latest_step() or 0) + 1, args=ocp.args.Composite(**items))
        if self._interrupted:
            raise InterruptError

    def arrays(self, like: Any) -> Any:
        """The arrays of the last save, as a tree like this one: its classes, shapes, dtypes and placement."""
        abstract = jax.tree.map(ocp.tree.to_shape_dtype_struct, like)
        restored = self._manager.restore(
            self._manager.latest_step(), args=ocp.args.Composite(arrays=ocp.args.StandardRestore(abstract))
        )
        return restored["arrays"]

    def _load(self, folder: Path) -> dict[str, Any]:
        last = self._manager.latest_step()
        if last is None:
            raise ResumeError(f"--resume: there is no checkpoint in {folder}")
        return self._manager.restore(last, args=ocp.args.Composite(record=ocp.args.JsonRestore()))["record"]


def _words(value: Any) -> str:
    return " ".join(value) if isinstance(value, list) else str(value)
