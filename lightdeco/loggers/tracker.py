"""The loggers "aim", "clearml", "dvclive", "swanlab" and "trackio": accelerate's tracker of that name."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from lightdeco.errors import LoggerError, nearest

from . import values, vendor

# Name -> accelerate's class.
_CLASSES: Final = {
    "aim": "AimTracker",
    "clearml": "ClearMLTracker",
    "dvclive": "DVCLiveTracker",
    "swanlab": "SwanLabTracker",
    "trackio": "TrackioTracker",
}

# What they would tell of machine and code by themselves, where an option turns it off.
_DEFAULTS: Final[Mapping[str, Mapping[str, Any]]] = {
    "aim": {"capture_terminal_logs": False, "log_system_params": False, "system_tracking_interval": None},
    "clearml": {
        "auto_connect_arg_parser": False,
        "auto_connect_frameworks": False,
        "auto_connect_streams": False,
        "auto_resource_monitoring": False,
    },
    "dvclive": {"monitor_system": False, "save_dvc_exp": False},
    "trackio": {"auto_log_cpu": False, "auto_log_gpu": False},
}
# SwanLab would keep the command line as it is, with the secrets in it, the output, packages and the machine's name.
_SWANLAB: Final = {
    "probe": dict.fromkeys(("hardware", "runtime", "requirements", "conda", "git", "swanlab", "monitor"), False),
    "terminal": {"proxy_type": "none"},
}


class Tracker:
    """Writes numbers and hyperparameters through a tracker of accelerate.

    Args:
        name: "aim", "clearml", "dvclive", "swanlab" or "trackio".
        run_name: the tracker's, for most of them the project; None is the name of the run's directory above.
        close_timeout: seconds that the end of a run waits for what is still to be sent.
        options: what the tracker passes on to the vendor, such as `dir=…` for dvclive and `mode="offline"` for swanlab.

    Raises:
        LoggerError: there is no such tracker.
    """

    def __init__(self, name: str, run_name: str | None = None, *, close_timeout: float = 30.0, **options: Any) -> None:
        if name not in _CLASSES:
            raise LoggerError(
                f"there is no tracker {name!r}{nearest(name, _CLASSES)}; available: {', '.join(_CLASSES)}"
            )
        self.name, self.run_name, self.close_timeout, self.options = name, run_name, close_timeout, options
        self.closes_on_training_thread = name == "swanlab"  # it sets a signal's handler back
        self._tracker: Any = None
        self._provenance: dict[str, object] = {}

    @property
    def native(self) -> Any:
        """The vendor's run, for what lightdeco has no name for.

        Raises:
            LoggerError: the logger is not open.
        """
        return vendor.opened(self._tracker, f"Tracker({self.name!r})").tracker

    def open(self, directory: Path) -> None:
        """Begin the vendor's run; Aim's and DVCLive's files are in the run's directory unless told otherwise.

        Raises:
            LoggerError: the package is missing.
        """
        try:
            vendor.load(self.name)
        except ImportError as error:
            raise LoggerError(
                f"the logger {self.name!r} needs a package that cannot be imported ({error}); "
                f"install it with `pip install {self.name}`"
            ) from error
        from accelerate import tracking

        made: Any = getattr(tracking, _CLASSES[self.name])
        options = {**_DEFAULTS.get(self.name, {}), **self.options}
        if self.name == "swanlab" and "settings" not in options:
            settings = vendor.load("swanlab").Settings
            known = getattr(settings, "model_fields", {})
            options["settings"] = settings(**{name: value for name, value in _SWANLAB.items() if name in known})
        if self.name == "dvclive":
            options = {"dir": str(directory / "dvclive"), **options}
        if made.requires_logging_directory:
            options = {"logging_dir": str(directory), **options}
        self._tracker = made(self.run_name or directory.absolute().parent.name or "lightdeco", **options)
        # Only the main process gets here; asking accelerate for it would make its process-wide state on any thread.
        self._tracker.main_process_only = False
        with vendor.beginning():
            self._call("start")

    def log_provenance(self, provenance: Mapping[str, object]) -> None:
        """Keep what the run was made with for `log_hparams`: a tracker takes its configuration once."""
        self._provenance = dict(provenance)

    def log_hparams(self, hparams: Mapping[str, object]) -> None:
        """Record hyperparameters, and what the run was made with below `lightdeco`; nested names have dots."""
        self._call("store_init_configuration", values.flat({**hparams, "lightdeco": self._provenance}))

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Record numbers."""
        self._call("log", dict(metrics), step)

    def close(self, status: str) -> None:
        """Finish the vendor's run."""
        if self._tracker is not None:
            self._call("finish")
            self._tracker = None

    def _call(self, method: str, *arguments: object) -> None:
        call = getattr(vendor.opened(self._tracker, f"Tracker({self.name!r})"), method)
        try:
            call(*arguments)
        except RuntimeError as error:
            # The work is done by then: accelerate's line of debugging after it needs a state that a run has no longer.
            if "initialize the accelerate state" not in str(error):
                raise
