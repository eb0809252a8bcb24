"""The logger "tensorboard": event files in the run's directory, for `tensorboard --logdir runs`."""

import copy
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lightdeco.errors import LoggerError

from . import values

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoard:
    """Writes TensorBoard event files; the step of every event is the run's `global_step`.

    Hyperparameters go to the HPARAMS tab and, as a text, to the TEXT tab, in the same files as all else.

    Args:
        directory: where the files are written; None is the run's directory.
        max_queue: events that wait for the writing thread before a call blocks.
        flush_secs: seconds between writes; a run that is killed loses at most what came after the last one.
        filename_suffix: appended to the names of the event files.
        graph: an example of what the model's `forward` takes, a tensor or a tuple of them: the model's graph is drawn
            with it before training, from a copy in eval mode.

    At the end of a run with hyperparameters, the least and greatest value of each validation metric is written as
    `min/val/…` and `max/val/…`, for the columns of the HPARAMS tab; the last value is there by itself.
    """

    def __init__(
        self,
        directory: str | Path | None = None,
        *,
        max_queue: int = 100,
        flush_secs: int = 10,
        filename_suffix: str = "",
        graph: torch.Tensor | tuple[torch.Tensor, ...] | None = None,
    ) -> None:
        self.directory = None if directory is None else Path(directory)
        self.max_queue = max_queue
        self.flush_secs = flush_secs
        self.filename_suffix = filename_suffix
        self.graph = graph
        self._writer: SummaryWriter | None = None
        self._has_hparams = False
        self._extremes, self._step = values.Extremes(), 0

    @property
    def native(self) -> "SummaryWriter":
        """The `torch.utils.tensorboard.SummaryWriter`, for what lightdeco has no name for.

        Raises:
            LoggerError: the logger is not open.
        """
        if self._writer is None:
            raise LoggerError("the logger TensorBoard is not open; it opens when a run starts, or with open(directory)")
        return self._writer

    def open(self, directory: Path) -> None:
        """Start an event file; `directory` is the run's. Needs the package `tensorboard`."""
        from torch.utils.tensorboard import SummaryWriter

        if self._writer is not None:
            self._writer.close()
        self._has_hparams = False
        self._extremes = values.Extremes()
        self._writer = SummaryWriter(
            str(self.directory or directory),
            max_queue=self.max_queue,
            flush_secs=self.flush_secs,
            filename_suffix=self.filename_suffix,
        )

    def watch(self, model: torch.nn.Module) -> None:
        """Draw the graph of the model, if an example input was given; neither model nor random state changes."""
        if self.graph is None:
            return
        inputs = self.graph if isinstance(self.graph, tuple) else (self.graph,)
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's tracer warns of every branch and of itself
            traced = copy.deepcopy(model).eval()
            self.native.add_graph(traced, tuple(value.to(device) for value in inputs))

    def cut(self, step: int) -> None:
        """Hide what earlier event files hold after `step`: the run continues from there."""
        from tensorboard.compat.proto import event_pb2

        proto: Any = event_pb2  # made at import time, so that checkers do not see what is in it
        start = proto.SessionLog(status=proto.SessionLog.START)
        for event in (proto.Event(file_version="brain.Event:2"), proto.Event(session_log=start)):
            self._file().add_event(event, step + 1)

    def log_provenance(self, provenance: Mapping[str, object]) -> None:
        """Write what the run was made with as the text `provenance`, a table of names and values."""
        flat = values.flat(provenance)
        self.log_table("provenance", {"name": list(flat), "value": list(flat.values())}, 0)

    def log_hparams(self, hparams: Mapping[str, object]) -> None:
        """Write hyperparameters; nested ones are named `outer.inner`.

        No list of metrics is written with them: TensorBoard then offers every metric of every run.
        """
        flat = values.flat(hparams)
        self._file().add_summary(_hparams_summary(flat))
        self._has_hparams = True
        self.log_table("hparams", {"name": list(flat), "value": list(flat.values())}, 0)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Write scalars."""
        for name, value in metrics.items():
            self.native.add_scalar(name, value, step)
        self._extremes.add(metrics)
        self._step = step

    def log_image(self, name: str, value: object, step: int) -> None:
        """Write an image: HxW, CxHxW or HxWxC (1, 3 or 4 channels), floats in 0..1 or uint8."""
        self.native.add_image(name, values.figure(value), step, dataformats="HWC")

    def log_figure(self, name: str, value: object, step: int) -> None:
        """Write a matplotlib figure, which stays open and keeps its canvas."""
        self.log_image(name, value, step)

    def log_histogram(self, name: str, value: object, step: int) -> None:
        """Write the distribution of the finite values of a tensor or array of any shape."""
        finite = values.finite(value)
        if finite.size:
            self.native.add_histogram(name, finite, step)

    def log_text(self, name: str, value: object, step: int) -> None:
        """Write a text, shown as markdown."""
        self.native.add_text(name, str(value), step)

    def log_table(self, name: str, value: object, step: int) -> None:
        """Write a table as a text: a dict of columns, a list of dicts, or a data frame."""
        self.native.add_text(name, values.markdown(value), step)

    def close(self, status: str) -> None:
        """Write how the run ended, and close the files."""
        if self._writer is not None:
            if self._has_hparams:
                for name, value in self._extremes.named().items():
                    self._writer.add_scalar(name, value, self._step)
                self._file().add_summary(_end_summary(finished=status == "finished"))
            self._writer.close()
            self._writer = None

    def _file(self) -> Any:
        writer: Any = self.native
        return writer._get_file_writer()


def _hparams_summary(flat: Mapping[str, str | float | bool]) -> object:
    from tensorboard.plugins.hparams import metadata, plugin_data_pb2

    proto: Any = plugin_data_pb2
    start = proto.SessionStartInfo()
    for key, value in flat.items():
        kind = "bool_value" if isinstance(value, bool) else "string_value" if isinstance(value, str) else "number_value"
        setattr(start.hparams[key], kind, value)
    return _plugin_summary(metadata.SESSION_START_INFO_TAG, session_start_info=start)


def _end_summary(finished: bool) -> object:
    from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

    api: Any = api_pb2
    proto: Any = plugin_data_pb2
    end = proto.SessionEndInfo(status=api.STATUS_SUCCESS if finished else api.STATUS_FAILURE)
    return _plugin_summary(metadata.SESSION_END_INFO_TAG, session_end_info=end)


def _plugin_summary(tag: str, **content: object) -> object:
    from tensorboard.compat.proto import summary_pb2
    from tensorboard.plugins.hparams import metadata, plugin_data_pb2

    summary: Any = summary_pb2
    proto: Any = plugin_data_pb2
    data = proto.HParamsPluginData(version=metadata.PLUGIN_DATA_VERSION, **content)
    plugin = summary.SummaryMetadata.PluginData(plugin_name=metadata.PLUGIN_NAME, content=data.SerializeToString())
    return summary.Summary(value=[summary.Summary.Value(tag=tag, metadata=summary.SummaryMetadata(plugin_data=plugin))])
