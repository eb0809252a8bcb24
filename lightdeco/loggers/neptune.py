"""The logger "neptune": Neptune's client, offline or with a server of one's own."""

import base64
import csv
import io
import json
import os
import socket
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal
from urllib.parse import urlsplit

from lightdeco.errors import LoggerError, warn

from . import values, vendor

# What a run tells of the machine and its code is off unless it is asked for.
_PRIVATE: Final = {
    "capture_hardware_metrics": False,
    "capture_stderr": False,
    "capture_stdout": False,
    "capture_traceback": False,
    "git_ref": False,
    "source_files": [],
}
_ANSWER: Final = 3.0  # seconds in which a server must accept a connection


class Neptune:
    """Writes to a run of Neptune.

    Neptune's hosted service closed in March 2026. Without a `mode`, and without the API token of a server of one's own,
    the run is offline, with a warning. NaN and infinities are left out, since Neptune knows none.

    Args:
        project, name: as in `neptune.init_run`.
        mode: "offline", "async", "sync", "debug"; None is `NEPTUNE_MODE`, or what is said above.
        directory: where offline data are written (in it `offline/…`); None is the run's directory, in `.neptune`. Send
            them to a server of your own later with `neptune sync`.
        api_token: of a server of your own; None is `NEPTUNE_API_TOKEN`.
        custom_run_id: names the run, to continue it; a resumed training does so by itself.
        run: a run that was begun already; it is written to and not stopped. What is above is then unused.
        environment: also record output, git state, source files and machine. They may hold secrets.
        close_timeout: seconds that the end of a run waits for what is still to be sent.
        options: further arguments of `neptune.init_run`, such as `tags`, `description`, `proxies`.
    """

    def __init__(
        self,
        project: str | None = None,
        name: str | None = None,
        mode: Literal["offline", "async", "sync", "debug"] | None = None,
        directory: str | Path | None = None,
        *,
        api_token: str | None = None,
        custom_run_id: str | None = None,
        run: Any = None,
        environment: bool = False,
        close_timeout: float = 30.0,
        **options: Any,
    ) -> None:
        self.mode, self.directory = mode, None if directory is None else Path(directory)
        self.custom_run_id, self.environment, self.close_timeout = custom_run_id, environment, close_timeout
        self.options = {"project": project, "name": name, **options}
        self._token = api_token
        self._given, self._run = run, run
        self._id = ""

    @property
    def native(self) -> Any:
        """The `neptune.Run`, for what lightdeco has no name for.

        Raises:
            LoggerError: the logger is not open.
        """
        return vendor.opened(self._run, "Neptune")

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Continue the run whose id a checkpoint kept."""
        self.custom_run_id = str(state["custom_run_id"])

    def state_dict(self) -> dict[str, object]:
        """The run's own id; offline runs of one id become one run when they are sent."""
        return {"custom_run_id": self._id}

    def open(self, directory: Path) -> None:
        """Begin the run, or continue it. Needs the package `neptune-client`, which provides the module `neptune`.

        Raises:
            LoggerError: the mode needs a server, and there is none.
        """
        neptune = vendor.load("neptune")
        if self._given is not None:
            return
        token = self._token or os.environ.get("NEPTUNE_API_TOKEN")
        mode = self.mode or os.environ.get("NEPTUNE_MODE") or _default_mode(token)
        if mode in ("async", "sync", "read-only"):
            _check_server(mode, token, bool(self.options.get("proxies")))
        self._id = self.custom_run_id or uuid.uuid4().hex
        options = ({} if self.environment else _PRIVATE) | self.options
        folder = self.directory or directory / ".neptune"
        with vendor.variable("NEPTUNE_DATA_DIRECTORY", str(folder)), vendor.beginning():
            self._run = neptune.init_run(mode=mode, api_token=token, custom_run_id=self._id, **options)

    def log_provenance(self, provenance: Mapping[str, object]) -> None:
        """Log what the run was made with below `lightdeco`."""
        self.native["lightdeco"] = vendor.load("neptune.utils").stringify_unsupported(dict(provenance))

    def log_hparams(self, hparams: Mapping[str, object]) -> None:
        """Log hyperparameters below `parameters`."""

        self.native["parameters"] = vendor.load("neptune.utils").stringify_unsupported(dict(hparams))

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Log numbers, but for those that are not finite."""
        for name, value in metrics.items():
            if abs(value) < float("inf"):
                self.native[name].append(value, step=step)

    def log_image(self, name: str, value: object, step: int) -> None:
        """Log an image as PNG."""
        self.native[name].append(vendor.load("neptune.types").File.as_image(values.picture(value)), step=step)

    def log_figure(self, name: str, value: object, step: int) -> None:
        """Log a figure as PNG."""
        self.log_image(name, value, step)

    def log_text(self, name: str, value: object, step: int) -> None:
        """Log a text."""
        self.native[name].append(str(value), step=step)

    def log_table(self, name: str, value: object, step: int) -> None:
        """Keep a table as the file `<name>/step_<step>`, in CSV."""
        columns, text = values.table(value), io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([list(columns), *zip(*columns.values(), strict=True)])
        self.native[f"{name}/step_{step}"].upload(
            vendor.load("neptune.types").File.from_content(text.getvalue(), extension="csv")
        )

    def log_artifact(self, path: Path) -> None:
        """Keep a file, or the files below a directory, below `artifacts`."""
        field = self.native[f"artifacts/{path.stem if path.is_file() else path.name}"]
        if path.is_dir():
            field.upload_files(str(path))
        else:
            field.upload(str(path))

    def close(self, status: str) -> None:
        """Log how the run ended as "status", and stop the run, unless it was given."""
        if self._run is None:
            return
        self._run["status"] = status
        self._run["sys/failed"] = status != "finished"
        if self._given is None:
            self._run.stop(seconds=self.close_timeout)
            self._run = None


def _default_mode(token: str | None) -> str:
    if token and not _is_hosted(_address(token)):
        return "async"
    warn(
        "Neptune's hosted service closed in March 2026: the logger 'neptune' works offline. Say so with "
        "Neptune(mode='offline'), or give the api_token of a server of your own"
    )
    return "offline"


def _check_server(mode: str, token: str | None, proxied: bool) -> None:
    """Refuse at once what Neptune's client would try for minutes."""
    advice = "use Neptune(mode='offline'), or the api_token of a server of your own"
    if not token:
        raise LoggerError(
            f"the logger 'neptune' in the mode {mode!r} needs an api_token (or NEPTUNE_API_TOKEN); {advice}"
        )
    address = _address(token)
    if _is_hosted(address):
        raise LoggerError(
            f"the api_token of the logger 'neptune' belongs to {address}, which closed in March 2026; {advice}"
        )
    if proxied or any(name in os.environ for name in ("HTTPS_PROXY", "HTTP_PROXY", "https_proxy", "http_proxy")):
        return
    found = urlsplit(address)
    try:
        port = found.port or (80 if found.scheme == "http" else 443)
        socket.create_connection((found.hostname or "", port), _ANSWER).close()
    except (OSError, ValueError) as error:
        raise LoggerError(
            f"the server {address} of the logger 'neptune' does not answer ({error}); {advice}"
        ) from error


def _address(token: str) -> str:
    """The server that an API token is for.

    Raises:
        LoggerError: it is no API token of Neptune.
    """
    try:
        found = json.loads(base64.b64decode(token.encode()))
        return os.environ.get("NEPTUNE_CUSTOM_URL") or str(found.get("api_url") or found["api_address"])
    except (ValueError, KeyError, AttributeError) as error:
        raise LoggerError(
            "the api_token of the logger 'neptune' is none of Neptune's (base64 of JSON with an api_address)"
        ) from error


def _is_hosted(address: str) -> bool:
    host = urlsplit(address).hostname or ""
    return host == "neptune.ai" or host.endswith(".neptune.ai")
