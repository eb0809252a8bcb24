"""What a logger must have, and what it may have."""

from collections.abc import Mapping
from typing import Protocol, runtime_checkable


@runtime_checkable
class Logger(Protocol):
    """What a logger must have: `log_metrics`. What it may have besides, each called where it exists:

    - `load_state_dict(state: Mapping[str, object])`: first, when a run is resumed: what `state_dict` gave;
    - `open(directory: Path)`: once before what follows, with the directory of the run;
    - `watch(model: Module)`: after `open`, before the first batch;
    - `state_dict() -> dict[str, object]`: plain values that a checkpoint keeps, such as the id of the vendor's run;
    - `cut(step: int)`: when a run is resumed: what was logged after `step` is void;
    - `rewind(records)`: then, the records (step, metrics) that stay, for a logger that writes its file anew;
    - `log_provenance(provenance: Mapping[str, object])`: what the run was made with: "seed", "settings" and
      "environment" (versions, platform, command, git_commit), as plain values, secrets masked;
    - `log_hparams(hparams: Mapping[str, object])`: after it; plain values, secrets masked;
    - `log_image`, `log_figure`, `log_histogram`, `log_text`, `log_table`, each `(name: str, value: Any, step: int)`:
      images and drawn figures as uint8 arrays (height, width, 1, 3 or 4 channels), histograms as arrays, texts as str,
      tables as dicts of columns;
    - `log_artifact(path: Path)`: a file or directory to keep;
    - `close(status: str)`: once, last; "finished", "failed" or "interrupted";
    - `close_timeout: float`: seconds that the end of a run waits for what is still to be logged (10);
    - `closes_on_training_thread: bool`: True where `close` must be called there, which then waits as long as it takes.

    All are called in the main process only: `load_state_dict`, `open`, `watch` and `state_dict` on the thread that
    trains, the others on a thread of the logger's own, in the order of the calls. Only `load_state_dict`, `open` and
    `watch` may fail a run.
    """

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Record numbers by name; `step` counts optimizer steps. Values may be NaN."""
