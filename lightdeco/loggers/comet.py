"""The logger "comet": Comet, online or offline."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from . import values, vendor

# What an experiment tells of the machine and its code, and what Comet logs by itself, is off unless it is asked for.
_PRIVATE: Final = {
    "auto_histogram_gradient_logging": False,
    "auto_log_co2": False,
    "auto_metric_logging": False,
    "auto_output_logging": False,
    "auto_param_logging": False,
    "log_code": False,
    "log_env_details": False,
    "log_git_metadata": False,
    "log_git_patch": False,
    "log_graph": False,
    "parse_args": False,
}


class Comet:
    """Writes to an experiment of Comet.

    Args:
        project, workspace, api_key, online: as in `comet_ml.start`; `online=False` writes an archive that
            `comet upload` sends later.
        offline_directory: where that archive is written; None is the run's directory.
        experiment_key: the key of the experiment, to continue it; a resumed training does so by itself.
        experiment: one that was begun already; it is written to and not ended. What is above is then unused.
        environment: also record command line, output, code, git state and machine. They may hold secrets.
        close_timeout: seconds that the end of a run waits for what is still to be written or uploaded.
        options: further arguments of `comet_ml.ExperimentConfig`, such as `name`, `tags`.
    """

    def __init__(
        self,
        project: str | None = None,
        workspace: str | None = None,
        online: bool | None = None,
        offline_directory: str | Path | None = None,
        *,
        api_key: str | None = None,
        experiment_key: str | None = None,
        experiment: Any = None,
        environment: bool = False,
        close_timeout: float = 30.0,
        **options: Any,
    ) -> None:
        self.offline_directory = None if offline_directory is None else Path(offline_directory)
        self.experiment_key, self.environment, self.close_timeout = experiment_key, environment, close_timeout
        self.options = options
        self._start = {"project": project, "workspace": workspace, "online": online, "api_key": api_key}
        self._given, self._experiment = experiment, experiment

    @property
    def native(self) -> Any:
        """The experiment of `comet_ml`, for what lightdeco has no name for.

        Raises:
            LoggerError: the logger is not open.
        """
        return vendor.opened(self._experiment, "Comet")

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Continue the experiment whose key a checkpoint kept."""
        self.experiment_key = str(state["experiment_key"])

    def state_dict(self) -> dict[str, object]:
        """The key of the experiment."""
        return {"experiment_key": self.native.get_key()}

    def open(self, directory: Path) -> None:
        """Begin the experiment, or continue it. Needs the package `comet-ml`."""
        # It would report errors to its makers, for a part of all processes drawn by chance, also offline.
        with vendor.variable("COMET_ERROR_TRACKING_ENABLE", os.environ.get("COMET_ERROR_TRACKING_ENABLE", "false")):
            comet = vendor.load("comet_ml")
        if self._given is not None:
            return
        folder = self.offline_directory or directory
        folder.mkdir(parents=True, exist_ok=True)
        options = ({} if self.environment else _PRIVATE) | {"offline_directory": str(folder)} | self.options
        with vendor.beginning():
            config = comet.ExperimentConfig(**options)
            self._experiment = comet.start(experiment_key=self.experiment_key, experiment_config=config, **self._start)

    def log_provenance(self, provenance: Mapping[str, object]) -> None:
        """Log what the run was made with as others, such as `settings.max_epochs` and `environment.git_commit`."""
        self.native.log_others(values.flat(provenance))

    def log_hparams(self, hparams: Mapping[str, object]) -> None:
        """Log hyperparameters; nested ones are named `outer.inner`."""
        self.native.log_parameters(values.flat(hparams))

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Log numbers."""
        self.native.log_metrics(dict(metrics), step=step)

    def log_image(self, name: str, value: object, step: int) -> None:
        """Log an image as PNG."""
        self.native.log_image(values.picture(value), name=name, step=step)

    def log_figure(self, name: str, value: object, step: int) -> None:
        """Log a figure as PNG."""
        self.log_image(name, value, step)

    def log_histogram(self, name: str, value: object, step: int) -> None:
        """Log the distribution of the finite values."""
        finite = values.finite(value)
        if finite.size:
            self.native.log_histogram_3d(finite, name=name, step=step)

    def log_text(self, name: str, value: object, step: int) -> None:
        """Log a text, with its name as metadata."""
        self.native.log_text(str(value), step=step, metadata={"name": name})

    def log_table(self, name: str, value: object, step: int) -> None:
        """Log a table as `<name>_step_<step>.csv`."""
        columns = values.table(value)
        rows = [list(row) for row in zip(*columns.values(), strict=True)]
        self.native.log_table(f"{name}_step_{step}.csv", tabular_data=rows, headers=list(columns))

    def log_artifact(self, path: Path) -> None:
        """Keep a file, or the files below a directory, as assets."""
        if path.is_dir():
            self.native.log_asset_folder(str(path), log_file_name=True, recursive=True)
        else:
            self.native.log_asset(str(path), file_name=path.name)

    def close(self, status: str) -> None:
        """Log how the run ended as "status", and end the experiment, unless it was given."""
        if self._experiment is None:
            return
        self._experiment.log_other("status", status)
        if self._given is None:
            self._experiment.end()
            self._experiment = None
