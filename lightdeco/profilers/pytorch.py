"""`PyTorch`: torch.profiler for a few steps, which tells which operators and kernels take the time."""

import warnings
from typing import TYPE_CHECKING, Any

from lightdeco.errors import SettingsError
from lightdeco.roles import STAGE_STEP, VERB_STAGE

from .facts import Facts

if TYPE_CHECKING:
    import torch

#: Whether one runs in this process: torch has room for one.
_running: list["PyTorch"] = []


class PyTorch:
    """Records a few steps with torch.profiler: a table of operators and a trace.

    A step begins with the step of the verb (`training_step` in `fit`) and ends where the next one begins. After
    `repeat` cycles the profiler is switched off. The trace lies in the run's directory, under `profile`: one file, for
    TensorBoard's profile plugin as well as for Perfetto and chrome://tracing. The table is printed at the end of
    the verb on the main process and written as `profile.txt`.

    Args:
        wait: steps of each cycle that are left out at first, >= 0. The first steps are slower than all others.
        warmup: steps in which torch's profiler runs and what it records is thrown away, >= 0.
        active: steps that are recorded, >= 1. A trace has some 0.1 to 1 MB per step.
        repeat: cycles, >= 1; each has a table and a trace.
        top: operators in the table, >= 1.
        record_shapes: also record the shapes of inputs.
        profile_memory: also record memory.
        with_stack: also record where in Python an operator was called (slow).
        with_flops: also count floating point operations.

    Raises:
        SettingsError: an argument is not allowed; when the verb begins, if torch's profiler is running already.

    >>> PyTorch(wait=10, active=5).active
    5
    """

    def __init__(
        self,
        wait: int = 1,
        warmup: int = 1,
        active: int = 3,
        repeat: int = 1,
        top: int = 20,
        record_shapes: bool = False,
        profile_memory: bool = False,
        with_stack: bool = False,
        with_flops: bool = False,
    ) -> None:
        numbers = {"wait": (wait, 0), "warmup": (warmup, 0), "active": (active, 1), "repeat": (repeat, 1)}
        for name, (number, least) in (numbers | {"top": (top, 1)}).items():
            if isinstance(number, bool) or not isinstance(number, int) or number < least:
                raise SettingsError(f"profilers.PyTorch({name}={number!r}); allowed: an integer of at least {least}")
        flags = {"record_shapes": record_shapes, "profile_memory": profile_memory}
        for name, flag in (flags | {"with_stack": with_stack, "with_flops": with_flops}).items():
            if not isinstance(flag, bool):
                raise SettingsError(f"profilers.PyTorch({name}={flag!r}); allowed: True, False")
        self.wait, self.warmup, self.active, self.repeat, self.top = wait, warmup, active, repeat, top
        self.record_shapes, self.profile_memory = record_shapes, profile_memory
        self.with_stack, self.with_flops = with_stack, with_flops
        self._facts = Facts("")
        self._profile: torch.profiler.profile | None = None
        self._actions: list[Any] = []
        self._tables: list[str] = []
        self._steps = 0
        self._failure = ""

    def begin(self, facts: Facts) -> None:
        """A verb begins.

        Raises:
            SettingsError: torch's profiler is running already.
        """
        from torch._C._autograd import _profiler_enabled

        if _running or _profiler_enabled():
            raise SettingsError(
                "profiler='pytorch', but torch's profiler is running already, and there is room for one; give "
                "profiler=None to the verb inside, or end the other"
            )
        self._facts, self._tables, self._steps, self._failure = facts, [], 0, ""
        _running.append(self)
        self._open()

    def _open(self) -> None:
        """Begin a cycle, with a torch profiler of its own: one that repeats keeps only the last one's events."""
        from torch.profiler import ProfilerActivity, profile, schedule

        device = {"cuda": [ProfilerActivity.CUDA], "xpu": [ProfilerActivity.XPU]}.get(self._facts.device, [])
        with warnings.catch_warnings():  # of warmup=0, which was asked for
            warnings.simplefilter("ignore", UserWarning)
            cycle = schedule(wait=self.wait, warmup=self.warmup, active=self.active, repeat=1)
        self._profile = profile(
            activities=[ProfilerActivity.CPU, *device],
            schedule=cycle,
            on_trace_ready=self._ready,
            record_shapes=self.record_shapes,
            profile_memory=self.profile_memory,
            with_stack=self.with_stack,
            with_flops=self.with_flops,
        )
        self._profile.start()

    def start(self, action: str) -> None:
        """An action begins: a span of the trace. The step of the verb, outside of all others, begins a new step."""
        if self._profile is None or action == self._facts.verb:
            return
        if not self._actions and action == STAGE_STEP[VERB_STAGE[self._facts.verb]]:
            self._next_step(self._profile)
            if self._profile is None:
                return
        from torch.profiler import record_function

        span = record_function(action)
        span.__enter__()  # type: ignore[no-untyped-call]  # torch's own has no types
        self._actions.append(span)

    def stop(self, action: str) -> None:
        """The action ends; with the verb the recording ends, if it has not ended before."""
        if self._actions:
            self._actions.pop().__exit__(None, None, None)
        elif self._profile is not None and action == self._facts.verb:
            self._end()

    def _next_step(self, profile: "torch.profiler.profile") -> None:
        self._steps += 1
        if self._steps == 1:
            return
        done = len(self._tables)
        profile.step()
        if len(self._tables) == self.repeat:
            self._end()
        elif len(self._tables) > done:
            profile.stop()
            self._open()

    def _end(self) -> None:
        assert self._profile is not None
        profile, self._profile = self._profile, None
        _running.remove(self)
        profile.stop()

    def _ready(self, profile: "torch.profiler.profile") -> None:
        """A cycle is done: keep its table and write its trace."""
        from torch.profiler import tensorboard_trace_handler

        by = "self_cpu_time_total" if self._facts.device == "cpu" else "self_device_time_total"
        self._tables.append(profile.key_averages().table(sort_by=by, row_limit=self.top, max_name_column_width=45))
        if self._facts.directory is not None:
            try:
                tensorboard_trace_handler(str(self._facts.directory / "profile"))(profile)
            except (OSError, RuntimeError) as error:  # a run does not fail for a trace
                self._failure = f"the trace could not be written: {error}"

    def summary(self) -> str:
        """The operators that took most time, for each cycle."""
        step = STAGE_STEP[VERB_STAGE[self._facts.verb]] if self._facts.verb else "step"
        if not self._tables:
            return (
                f"torch's profiler recorded nothing: it begins after {self.wait + self.warmup} steps "
                f"(wait={self.wait}, warmup={self.warmup}), and {step} ran {self._steps} times"
            )
        where = f"; traces: {self._facts.directory / 'profile'}" if self._facts.directory is not None else ""
        where = f"; {self._failure}" if self._failure else where
        heading = f"operators in {self.active} of the steps{where}"
        return "\n".join([heading, *(table.rstrip() for table in self._tables)])
