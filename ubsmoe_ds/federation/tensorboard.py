"""Write TensorBoard's event file. It is an optional log: a full disk ends the log with a warning, never the run."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from ubsmoe_ds.base.terminal import say

# after which a thread has written what is logged, so that a round need not wait for it; with TensorFlow installed, the
# default would be two minutes
FLUSH_SECONDS = 1
Result = TypeVar("Result")


class TensorBoard:
    """Log scalars, texts and pictures.

    Args:
        folder: folder of the event files.
        purge_step: hide what earlier files have from this step on; None: hide nothing.
    """

    def __init__(self, folder: Path, purge_step: int | None) -> None:
        self.folder = folder
        self._writer = self._attempt(
            lambda: SummaryWriter(str(folder), purge_step=purge_step, flush_secs=FLUSH_SECONDS)
        )

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Log values by their names."""
        # one event for all: hundreds of scalars a round take ten times as long one by one
        summary = Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()])
        self._log(lambda writer: writer._get_file_writer().add_summary(summary, step))

    def text(self, name: str, text: str, step: int) -> None:
        """Log a text."""
        self._log(lambda writer: writer.add_text(name, text, step))

    def image(self, name: str, image_3HW: Tensor, step: int) -> None:
        """Log a picture, [3, height, width]."""
        self._log(lambda writer: writer.add_image(name, image_3HW, step))

    def flush(self) -> None:
        """Wait until everything is in the file."""
        self._log(lambda writer: writer.flush())

    def close(self) -> None:
        """Close the file; nothing is logged from now on."""
        self._log(lambda writer: writer.close())
        self._writer = None

    def _log(self, write: Callable[[SummaryWriter], object]) -> None:
        writer = self._writer
        if writer is not None:
            self._attempt(lambda: write(writer))

    def _attempt(self, action: Callable[[], Result]) -> Result | None:
        """Return the action's result; where the disk fails, warn and log no more."""
        try:
            return action()
        except OSError as error:
            self._writer = None
            reason = error.strerror or error
            text = f"warning: {self.folder}: TensorBoard's log ends here ({reason}); training goes on"
            say(text, error=True)
            return None
