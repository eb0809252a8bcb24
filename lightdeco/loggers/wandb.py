"""The logger "wandb": Weights & Biases, online, offline or disabled."""

import os
import re
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

import numpy
from torch import nn
from torch.utils.hooks import RemovableHandle

from . import values, vendor

# What a run tells of the machine and its code is off unless it is asked for; names that a version lacks are left out.
_PRIVATE: Final = {
    "console": "off",
    "disable_code": True,
    "disable_git": True,
    "save_code": False,
    "x_disable_machine_info": True,
    "x_disable_meta": True,
    "x_save_requirements": False,
}

# So that a process that is killed loses a second and not W&B's 15.
_KEPT: Final = {"x_transaction_log_flush_interval": 1.0}
_Bins = tuple[values.Array, values.Array]


class WandB:
    """Writes to a run of Weights & Biases; the x axis of every metric is `global_step`.

    Metrics come with `global_step` as their step metric rather than with W&B's own step, so that records may come in
    any order. The summary holds the last value of each metric, and `min/val/…` and `max/val/…` at the end.

    Args:
        project, name, mode: as in `wandb.init`; mode is "online", "offline", "disabled", or None for W&B's setting.
        directory: where local files are written; None is the run's directory. Upload an offline run later with
            `wandb sync <directory>/wandb/offline-run-…`.
        id: the id of the run, to continue it; a resumed training does so by itself.
        run: a run that was begun with `wandb.init`; it is written to and not finished. What is above is then unused.
        watch: "gradients", "parameters" or "all": histograms of them every `watch_every` backward passes.
        environment: also record command line, console output, git state, packages and machine. They may hold secrets.
        close_timeout: seconds that the end of a run waits for what is still to be uploaded.
        options: further arguments of `wandb.init`, such as `entity`, `tags`, `group`, `settings`.
    """

    def __init__(
        self,
        project: str | None = None,
        name: str | None = None,
        mode: Literal["online", "offline", "disabled"] | None = None,
        directory: str | Path | None = None,
        *,
        id: str | None = None,
        run: Any = None,
        watch: Literal["gradients", "parameters", "all"] | None = None,
        watch_every: int = 1000,
        environment: bool = False,
        close_timeout: float = 30.0,
        **options: Any,
    ) -> None:
        self.directory = None if directory is None else Path(directory)
        self.id, self.environment, self.close_timeout = id, environment, close_timeout
        self.watched: tuple[str | None, int] = (watch, watch_every)
        self.options = {"project": project, "name": name, "mode": mode, **options}
        self._given, self._run = run, run
        self._hooks: list[RemovableHandle] = []
        self._backwards: Counter[str] = Counter()
        self._histograms: dict[str, _Bins] = {}
        self._resumes = False
        self._extremes = values.Extremes()

    @property
    def native(self) -> Any:
        """The `wandb.Run`, for what lightdeco has no name for.

        Raises:
            LoggerError: the logger is not open.
        """
        return vendor.opened(self._run, "WandB")

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Continue the run whose id a checkpoint kept."""
        self.id, self._resumes = str(state["id"]), True

    def state_dict(self) -> dict[str, object]:
        """The id of the run."""
        return {"id": self.native.id}

    def open(self, directory: Path) -> None:
        """Begin the run, or continue it. Needs the package `wandb`."""
        self._extremes = values.Extremes()
        if self._given is None:
            folder = self.directory or directory
            folder.mkdir(parents=True, exist_ok=True)  # W&B would go elsewhere
            # It would report errors to its makers, whatever the mode.
            with vendor.variable("WANDB_ERROR_REPORTING", os.environ.get("WANDB_ERROR_REPORTING", "false")):
                wandb = vendor.load("wandb")
                options = {"reinit": "create_new", **self.options}  # another run of the process stays as it is
                options["settings"] = _settings(wandb, options.get("settings"), self.environment)
                if self._resumes:
                    options["resume"] = "allow"
                with vendor.beginning():
                    self._run = wandb.init(dir=str(folder), id=self.id, **options)
        self.native.define_metric("global_step")
        self.native.define_metric("*", step_metric="global_step")

    def watch(self, model: nn.Module) -> None:
        """Hook histograms of gradients or parameters to the model, if that was asked for.

        W&B's own `watch` writes to the process's global run and can fail within `backward`; this does neither.
        """
        if self.watched[0] is not None:
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    untyped: Any = parameter
                    self._hooks.append(untyped.register_post_accumulate_grad_hook(partial(self._seen, name)))

    def log_provenance(self, provenance: Mapping[str, object]) -> None:
        """Put what the run was made with below `lightdeco` of the run's config."""
        self.native.config.update({"lightdeco": dict(provenance)}, allow_val_change=True)

    def log_hparams(self, hparams: Mapping[str, object]) -> None:
        """Make hyperparameters the run's config."""
        self.native.config.update(dict(hparams), allow_val_change=True)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Log numbers."""
        self._extremes.add(metrics)
        seen, self._histograms = self._histograms, {}
        self._log({**metrics, **{name: self._histogram(bins) for name, bins in seen.items()}}, step)

    def log_image(self, name: str, value: object, step: int) -> None:
        """Log an image as PNG."""
        self._log({name: vendor.load("wandb").Image(values.picture(value))}, step)

    def log_figure(self, name: str, value: object, step: int) -> None:
        """Log a figure as PNG."""
        self.log_image(name, value, step)

    def log_histogram(self, name: str, value: object, step: int) -> None:
        """Log the distribution of the finite values in 64 bins."""
        bins = _bins(value)
        if bins is not None:
            self._log({name: self._histogram(bins)}, step)

    def log_text(self, name: str, value: object, step: int) -> None:
        """Log a text, as a table of one cell: the form that W&B shows."""
        self.log_table(name, {"text": [str(value)]}, step)

    def log_table(self, name: str, value: object, step: int) -> None:
        """Log a table."""
        columns = values.table(value)
        rows = [list(row) for row in zip(*columns.values(), strict=True)]
        table = vendor.load("wandb").Table(columns=list(columns), data=rows, allow_mixed_types=True)
        self._log({name: table}, step)

    def log_artifact(self, path: Path) -> None:
        """Keep a file or directory as an artifact of the type "file", named after it."""
        artifact = vendor.load("wandb").Artifact(re.sub(r"[^\w.-]", "-", path.name), type="file")
        if path.is_dir():
            artifact.add_dir(str(path))
        else:
            artifact.add_file(str(path))
        self.native.log_artifact(artifact)

    def close(self, status: str) -> None:
        """Finish the run, unless it was given; a run that did not finish is marked as failed."""
        if self._run is None:
            return
        self._run.summary.update(self._extremes.named())
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        if self._given is None:
            self._run.finish(exit_code=0 if status == "finished" else 1)
            self._run = None

    def _seen(self, name: str, parameter: nn.Parameter) -> None:
        """After each backward pass: keep the histograms of one parameter for the next record, when they are due."""
        what, every = self.watched
        self._backwards[name] += 1
        if self._backwards[name] % every:
            return
        shown = {"gradients": parameter.grad, "parameters": parameter}
        for kind in shown if what == "all" else [str(what)]:
            bins = _bins(shown[kind])
            if bins is not None:
                self._histograms = {**self._histograms, f"{kind}/{name}": bins}

    @staticmethod
    def _histogram(bins: _Bins) -> Any:
        return vendor.load("wandb").Histogram(np_histogram=bins)

    def _log(self, found: Mapping[str, object], step: int) -> None:
        self.native.log({**found, "global_step": step})


def _bins(value: object) -> _Bins | None:
    """Counts and edges of the finite values in 64 bins, or None without any."""
    finite = values.finite(value)
    return numpy.histogram(finite, bins=64) if finite.size else None


def _settings(wandb: Any, given: Any, environment: bool) -> Any:
    """Settings that tell nothing of the environment, overlaid with those given."""
    known = set(wandb.Settings.model_fields)
    ours = _KEPT if environment else _KEPT | _PRIVATE
    settings = wandb.Settings(**{name: value for name, value in ours.items() if name in known})
    if given is not None:
        settings.update_from_settings(wandb.Settings(**given) if isinstance(given, Mapping) else given)
    return settings
