"""Devices, precision and strategy -> an Accelerator; what is put back after a verb."""

import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import torch

from . import fp8, seeds, strategies, xla
from .errors import LaunchError, MarkError, SettingsError, nearest, warn
from .joined import joined, place
from .plan import Hook, Plan
from .settings import Settings

if TYPE_CHECKING:
    from accelerate import Accelerator

_PRECISION: dict[str, str] = dict.fromkeys(("32-true", "16-true", "bf16-true", "64-true"), "no")
_PRECISION |= {"16-mixed": "fp16", "bf16-mixed": "bf16", "fp8": "fp8"}

NO_SYNC: Final = "sync_batchnorm=True: torch's SyncBatchNorm works on GPUs only"
#: The dtype of weights and inputs where it is not the model's own.
TRUE: Final = {"16-true": torch.float16, "bf16-true": torch.bfloat16, "64-true": torch.float64}


def count(settings: Settings, plan: Plan | None = None) -> int:
    """How many processes have to be started here; 1 where this process does the work, alone or as one of several.

    Raises:
        LaunchError: the devices are not there, the launcher started another number, or several machines are asked for
            without a launcher.
    """
    if plan is not None:
        fp8.require(settings, kind_of(settings), plan.one("configure_accelerator") is not None)
    if joined():
        _check_joined(settings)
        strategies.check(settings, kind_of(settings), place().world_size, plan)
        return 1
    wanted = _count(settings)
    strategies.check(settings, kind_of(settings), wanted, plan)
    return wanted


def _count(settings: Settings) -> int:
    if settings.num_nodes > 1:
        raise LaunchError(
            f"num_nodes={settings.num_nodes}: a process cannot start others on other machines; start the script on "
            "each with torchrun, accelerate launch or srun, see docs/clusters.md"
        )
    kind, devices = kind_of(settings), settings.devices
    _refuse_half(settings.precision, kind)
    if kind == "cuda":
        there = torch.cuda.device_count()
        wanted = _number(devices) or there
        if wanted > there or (isinstance(devices, list) and max(devices) >= there):
            raise LaunchError(f"devices={devices!r}, but torch finds {there} GPUs here")
        return wanted
    if isinstance(devices, list):
        if devices == [0]:
            return 1
        raise LaunchError(f"devices={devices!r}: a {kind} has no numbers; give how many processes, such as devices=2")
    if not isinstance(devices, int) or devices in (-1, 1):
        return 1
    if kind != "cpu":
        raise LaunchError(f"devices={devices!r}: there is one {kind} device here, and one process for it")
    if settings.sync_batchnorm:
        raise LaunchError(NO_SYNC)
    return devices


def _number(devices: Any) -> int | None:
    """How many devices are asked for; None: all that are there."""
    return None if devices in ("auto", -1) else devices if isinstance(devices, int) else len(list(devices))


def visible(settings: Settings) -> list[int] | None:
    """The GPUs of the processes that are started, as this process counts them; None: the first ones, or no GPUs."""
    return list(settings.devices) if isinstance(settings.devices, list) and kind_of(settings) == "cuda" else None


def _check_joined(settings: Settings) -> None:
    here, devices = place(), settings.devices
    asked = _number(devices)
    if asked is not None and asked != here.local_world_size:
        raise LaunchError(
            f"devices={devices!r}, but the launcher started {here.local_world_size} processes on this machine; leave "
            "devices out, or start as many"
        )
    nodes = here.world_size // here.local_world_size
    if settings.num_nodes not in (1, nodes):
        raise LaunchError(f"num_nodes={settings.num_nodes}, but the launcher started processes on {nodes} machines")


def make_accelerator(settings: Settings, configured: dict[str, Any], several: bool = False) -> "Accelerator":
    """The Accelerator of a run; `configured` is what `configure_accelerator` returned, and wins.

    `several`: the run has several training steps, each of which leaves out some parameters.

    Raises:
        LaunchError: the device is not there, or this machine cannot run the strategy; or gradients are compressed.
    """
    from accelerate import Accelerator

    kind = kind_of(settings)
    _refuse_half(settings.precision, kind)
    if settings.precision == "16-true":
        warn("precision='16-true' does not scale the loss: gradients below 6e-8 become 0; 'bf16-true' is safer")
    arguments: dict[str, Any] = {"cpu": kind == "cpu", "mixed_precision": _PRECISION[settings.precision]}
    meant, handlers = strategies.arguments(settings, several), list(configured.get("kwargs_handlers") or ())
    others = [handler for handler in meant.get("kwargs_handlers", ()) if type(handler) not in map(type, handlers)]
    arguments |= configured | {"kwargs_handlers": [*handlers, *others]}
    arguments = fp8.with_recipe(settings, kind, arguments)
    if isinstance(settings.devices, list) and len(settings.devices) == 1 and kind == "cuda" and not joined():
        torch.cuda.set_device(settings.devices[0])
        os.environ["ACCELERATE_TORCH_DEVICE"] = f"cuda:{settings.devices[0]}"
    threads = os.environ.get("OMP_NUM_THREADS")
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))  # or else accelerate sets it, and warns
    bf16 = os.environ.get("XLA_USE_BF16")
    try:
        with xla.kept_out(kind), strategies.launcher_unheard():
            accelerator = Accelerator(**arguments)
    finally:
        os.environ.pop("ACCELERATE_TORCH_DEVICE", None)
        if threads is None:
            del os.environ["OMP_NUM_THREADS"]
    if kind == "xla":
        xla.check(accelerator, bf16)
    return accelerator


def _refuse_half(precision: str, kind: str) -> None:
    if precision in ("16-mixed", "16-true") and kind != "cuda":
        raise SettingsError(
            f"precision={precision!r} needs a CUDA device, and this run is on {kind!r}, where fp16 is slow or "
            f"missing; use 'bf16-{precision.rpartition('-')[2]}' or '32-true'"
        )


def kind_of(settings: Settings) -> str:
    """The kind of device that "auto" or a name stands for here: "cpu", "cuda", "mps" or "xla"."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    asked = {"gpu": "cuda", "tpu": "xla"}.get(settings.accelerator, settings.accelerator)
    if asked == "xla":
        xla.require(settings.accelerator)
        return asked
    if asked == "auto" and xla.is_tpu():
        return "xla"
    if asked == "auto":
        return next(kind for kind, found in there.items() if found)
    if not there[asked]:
        found = ", ".join(kind for kind, found in there.items() if found)
        raise LaunchError(f"accelerator={settings.accelerator!r}, but torch finds none here; found: {found}")
    return asked


def accelerator_arguments(hook: Hook | None, returned: object) -> dict[str, Any]:
    """What `configure_accelerator` returned, checked against the arguments of `accelerate.Accelerator`.

    Raises:
        MarkError: no dict with str keys, or an argument that `Accelerator` does not take.
    """
    if hook is None:
        return {}
    if not isinstance(returned, dict) or not all(isinstance(key, str) for key in returned):
        raise MarkError(f"{hook.where} returned {type(returned).__name__}; return a dict of arguments for Accelerator")
    from accelerate import Accelerator

    allowed = list(inspect.signature(Accelerator).parameters)
    for key in returned:
        if key not in allowed:
            raise MarkError(f"{hook.where} returned {key!r}, which Accelerator does not take{nearest(key, allowed)}")
        if key in strategies.ARGUMENTS and returned[key] is not None:
            raise MarkError(f"{hook.where} returned {key!r}; {strategies.ARGUMENTS[key]}")
    return returned


# ---- what is put back after a verb -----------------------------------------------------------------------------------


class Process:
    """The process-wide state that belongs to one verb, and that the caller must not see changed.

    Random state (torch, NumPy, `random`), accelerate's state and torch's flags are the run's inside of `entered()`, and
    the caller's outside of it. `predict` leaves and enters it around each output that it hands out.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        if settings.accelerator in ("auto", "tpu", "xla") and kind_of(settings) == "xla":
            xla.begin()  # before the caller's random state is looked at
        self._accelerate: list[Any] | None = None
        self._random: dict[str, Any] | None = None
        self._inside = 0

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Swap the run's state in, and the caller's back at the end. May be nested."""
        with seeds.preserved(), self._random_state(), self._accelerate_state(), torch_flags(self._settings):
            yield

    @contextmanager
    def _random_state(self) -> Iterator[None]:
        """Go on from the state that the run had when it was left; the first time from the caller's."""
        if self._random is not None and not self._inside:
            seeds.set_random_state(self._random)
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1
            if not self._inside:
                self._random = seeds.random_state()

    @contextmanager
    def _accelerate_state(self) -> Iterator[None]:
        """Each state class of accelerate shares one dict among its instances.

        The dict itself is replaced, not cleared, so that the caller's objects and the run's keep theirs.
        """
        from accelerate.state import AcceleratorState, GradientState, PartialState

        classes = (PartialState, AcceleratorState, GradientState)
        before = [vars(cls)["_shared_state"] for cls in classes]
        if self._accelerate is None:
            self._accelerate = [type(state)() for state in before]
        for cls, state in zip(classes, self._accelerate, strict=True):
            cls._shared_state = state
        try:
            yield
        finally:
            for cls, state in zip(classes, before, strict=True):
                cls._shared_state = state


@contextmanager
def torch_flags(settings: Settings) -> Iterator[None]:
    """`benchmark`, `deterministic`, `detect_anomaly` and the dtype of `precision` during a run."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(TRUE.get(settings.precision, dtype))  # for what steps and layers make
    benchmark = torch.backends.cudnn.benchmark
    deterministic = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    if settings.benchmark is not None:
        torch.backends.cudnn.benchmark = settings.benchmark
    if settings.deterministic:
        # cuBLAS is deterministic only with this variable, read when its first handle is made.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=settings.deterministic == "warn")
    try:
        with torch.autograd.set_detect_anomaly(settings.detect_anomaly or torch.is_anomaly_enabled()):
            yield
    finally:
        torch.set_default_dtype(dtype)
        torch.backends.cudnn.benchmark = benchmark
        torch.use_deterministic_algorithms(deterministic[0], warn_only=deterministic[1])
