"""Slurm: a signal before the time limit saves the run and asks for the job to be run again.

    #SBATCH --signal=USR1@120        Slurm sends SIGUSR1 to the job's steps two minutes before the end

`LIGHTDECO_REQUEUE_SIGNAL` names another signal, or "none". Outside of Slurm, and in an interactive job, nothing here
has an effect. The process ends with status 128 + signal, 138 for SIGUSR1.
"""

import os
import signal
import subprocess
from collections.abc import Mapping
from typing import Final

from .errors import LaunchError, nearest, warn
from .run import Run
from .session import Saving
from .settings import Settings
from .signals import Signals

VARIABLE: Final = "LIGHTDECO_REQUEUE_SIGNAL"
_ALLOWED: Final = ("SIGUSR1", "SIGTERM", "SIGHUP", "none")  # SIGUSR2 shows the stack of a process that hangs
_INTERACTIVE: Final = ("bash", "interactive")


def wanted(variables: Mapping[str, str] = os.environ) -> int | None:
    """The signal on which a run is saved and its job requeued; None outside of a batch job of Slurm.

    Raises:
        LaunchError: the variable names no signal that can be used.

    >>> wanted({"SLURM_JOB_ID": "7"}) == signal.SIGUSR1, wanted({"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "bash"})
    (True, None)
    """
    if not variables.get("SLURM_JOB_ID") or variables.get("SLURM_JOB_NAME") in _INTERACTIVE:
        return None
    name = variables.get(VARIABLE) or "SIGUSR1"
    if name not in _ALLOWED:
        raise LaunchError(f"{VARIABLE}={name!r}; allowed: {', '.join(_ALLOWED)}{nearest(name, _ALLOWED)}")
    return None if name == "none" else int(signal.Signals[name])


def job(variables: Mapping[str, str] = os.environ) -> str:
    """What Slurm calls the job: of an array, the one task.

    >>> job({"SLURM_JOB_ID": "12"}), job({"SLURM_JOB_ID": "12", "SLURM_ARRAY_JOB_ID": "9", "SLURM_ARRAY_TASK_ID": "3"})
    ('12', '9_3')
    """
    if variables.get("SLURM_ARRAY_JOB_ID") and variables.get("SLURM_ARRAY_TASK_ID"):
        return f"{variables['SLURM_ARRAY_JOB_ID']}_{variables['SLURM_ARRAY_TASK_ID']}"
    return variables["SLURM_JOB_ID"]


def requeue(signals: Signals, run: Run, settings: Settings, saver: Saving | None) -> None:
    """Ask Slurm to run the job again, on the main process, when the signal for it ended a run that is saved.

    Called last: from now on Slurm may end this process. Where it is not done, a warning says why.
    """
    if signals.requeues is None or signals.received != signals.requeues or not run.is_main:
        return
    if saver is None or not saver.saved():
        warn(f"{signals.name}: the job is not requeued, since the run is not saved as it is now")
    elif settings.resume not in ("auto", "last"):
        warn(
            f"{signals.name}: the run is saved, but the job is not requeued: without resume='auto' it would begin anew"
        )
    else:
        _scontrol()


def _scontrol() -> None:
    try:
        command = ["scontrol", "requeue", job()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        failure = f"it ended with status {done.returncode}: {done.stderr.strip()}" if done.returncode else None
    except (OSError, subprocess.TimeoutExpired) as error:
        failure = str(error)
    if failure is not None:
        warn(f"the run is saved, but `scontrol requeue {job()}` failed; submit the job again ({failure})")
