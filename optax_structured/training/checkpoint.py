"""The state of a run on disk, through orbax."""

import pathlib
from typing import Any

import orbax.checkpoint as ocp

FOLDER = "checkpoints"


class Checkpoints:
    """The last state of a run: parameters and optimizer state, by step. Use as a context."""

    def __init__(self, folder: pathlib.Path) -> None:
        options = ocp.CheckpointManagerOptions(max_to_keep=1)
        self._manager = ocp.CheckpointManager((folder / FOLDER).resolve(), options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()

    def __bool__(self) -> bool:
        return self._manager.latest_step() is not None

    def save(self, step: int, state: Any) -> None:
        """Keeps this state instead of the one before."""
        self._manager.save(step, args=ocp.args.StandardSave(state))
        # The next step is given these buffers to overwrite: they must be on disk by then.
        self._manager.wait_until_finished()

    def restore(self, like: Any) -> tuple[int, Any]:
        """The step and the state that were saved last.

        Args:
          like: a state, concrete or abstract, of the same structure, shapes and dtypes.

        Raises:
          FileNotFoundError: nothing was saved.
        """
        step = self._manager.latest_step()
        if step is None:
            raise FileNotFoundError(
                f"{self._manager.directory} holds no checkpoint; start the run again with another "
                "--out"
            )
        return step, self._manager.restore(step, args=ocp.args.StandardRestore(like))
