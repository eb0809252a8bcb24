"""The logger "mlflow": MLflow, in a local database or on a server."""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from . import values, vendor

_STATUS: Final = {"finished": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}
# What one request may hold.
_MAX_PARAMS, _MAX_TAGS, _MAX_METRICS, _MAX_TEXT = 100, 100, 1000, 6000


class MLflow:
    """Writes to a run of MLflow through a client of its own: `mlflow.active_run()` of the process stays as it is.

    Args:
        experiment_name: made where it does not exist; None is `MLFLOW_EXPERIMENT_NAME` or "Default".
        run_name: None is the last two parts of the run's directory, such as "Net/version_3".
        tracking_uri: a database or server; None is `MLFLOW_TRACKING_URI` or MLflow's default, a SQLite file here.
        run_id: the id of a run, to continue it; a resumed training does so by itself.
        artifact_location: where a new experiment keeps its files.
        tags: of the run.
        close_timeout: seconds that the end of a run waits for what is still to be written.
    """

    def __init__(
        self,
        experiment_name: str | None = None,
        run_name: str | None = None,
        tracking_uri: str | None = None,
        *,
        run_id: str | None = None,
        artifact_location: str | None = None,
        tags: Mapping[str, str] | None = None,
        close_timeout: float = 30.0,
    ) -> None:
        self.experiment_name, self.run_name, self.tracking_uri = experiment_name, run_name, tracking_uri
        self.run_id, self.artifact_location, self.tags = run_id, artifact_location, dict(tags or {})
        self.close_timeout = close_timeout
        self._client: Any = None
        self._id = ""

    @property
    def native(self) -> Any:
        """The `mlflow.MlflowClient`, for what lightdeco has no name for; `state_dict()` tells the run's id.

        Raises:
            LoggerError: the logger is not open.
        """
        return vendor.opened(self._client, "MLflow")

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Continue the run whose id a checkpoint kept."""
        self.run_id = str(state["run_id"])

    def state_dict(self) -> dict[str, object]:
        """The id of the run."""
        return {"run_id": self._id}

    def open(self, directory: Path) -> None:
        """Begin the run, or continue it. Needs the package `mlflow`."""
        # It would look for its makers' server when it is imported, also with a local file.
        with vendor.variable("MLFLOW_DISABLE_TELEMETRY", os.environ.get("MLFLOW_DISABLE_TELEMETRY", "true")):
            mlflow = vendor.load("mlflow")
        with vendor.beginning():
            client = mlflow.MlflowClient(self.tracking_uri)
            if self.run_id is not None:
                client.update_run(self.run_id, status="RUNNING")
                self._id = self.run_id
            else:
                name = self.run_name or "/".join(directory.absolute().parts[-2:])
                self._id = client.create_run(self._experiment(client), tags=self.tags, run_name=name).info.run_id
        self._client = client

    def log_provenance(self, provenance: Mapping[str, object]) -> None:
        """Make what the run was made with tags: a resumed run may change them, which no param may."""
        made, flat = vendor.load("mlflow.entities").RunTag, values.flat(provenance)
        commit = flat.get("environment.git_commit")
        named = {"mlflow.source.git.commit": commit} if commit and commit != "None" else {}  # shown as the version
        found = [made(key, str(value)[:_MAX_TEXT]) for key, value in {**flat, **named}.items()]
        for start in range(0, len(found), _MAX_TAGS):
            self.native.log_batch(self._id, tags=found[start : start + _MAX_TAGS])

    def log_hparams(self, hparams: Mapping[str, object]) -> None:
        """Log hyperparameters as params; nested ones are named `outer.inner`, long texts are cut."""
        made = vendor.load("mlflow.entities").Param

        found = [made(key, str(value)[:_MAX_TEXT]) for key, value in values.flat(hparams).items()]
        for start in range(0, len(found), _MAX_PARAMS):
            self.native.log_batch(self._id, params=found[start : start + _MAX_PARAMS])

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Log numbers."""
        made = vendor.load("mlflow.entities").Metric

        now = int(time.time() * 1000)
        found = [made(name, value, now, step) for name, value in metrics.items()]
        for start in range(0, len(found), _MAX_METRICS):
            self.native.log_batch(self._id, metrics=found[start : start + _MAX_METRICS])

    def log_image(self, name: str, value: object, step: int) -> None:
        """Log an image as PNG."""
        self.native.log_image(self._id, values.picture(value), key=name, step=step)

    def log_figure(self, name: str, value: object, step: int) -> None:
        """Log a figure as PNG."""
        self.log_image(name, value, step)

    def log_text(self, name: str, value: object, step: int) -> None:
        """Keep a text as the artifact `<name>/step_<step>.txt`."""
        self.native.log_text(self._id, str(value), f"{name}/step_{step}.txt")

    def log_table(self, name: str, value: object, step: int) -> None:
        """Keep a table as the artifact `<name>/step_<step>.json`, which MLflow shows as a table."""
        self.native.log_table(self._id, values.table(value), f"{name}/step_{step}.json")

    def log_artifact(self, path: Path) -> None:
        """Keep a file, or a directory with all that is in it."""
        self.native.log_artifact(self._id, str(path))

    def close(self, status: str) -> None:
        """End the run as FINISHED, FAILED or KILLED."""
        if self._client is not None:
            self._client.set_terminated(self._id, _STATUS.get(status, "FAILED"))
            self._client = None

    def _experiment(self, client: Any) -> str:
        name = self.experiment_name or os.environ.get("MLFLOW_EXPERIMENT_NAME") or "Default"
        found = client.get_experiment_by_name(name)
        if found is not None:
            return str(found.experiment_id)
        return str(client.create_experiment(name, artifact_location=self.artifact_location))
