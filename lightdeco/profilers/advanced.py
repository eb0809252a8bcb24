"""`Advanced`: Python's own profiler for each action, which tells in which functions its time goes."""

import cProfile
import io
import pstats
import sys
from pathlib import Path
from typing import Final, Literal, get_args

from lightdeco.errors import LightdecoError, SettingsError, nearest

Sort = Literal["cumulative", "time", "calls"]

#: The action of `predict` in which its caller has the floor: no code of the run.
CALLER: Final = "the caller of predict"

#: What is being profiled now in this process, innermost last; None while the caller of `predict` has the floor. Only
#: the innermost is switched on, also where a verb runs inside of another.
_running: list[cProfile.Profile | None] = []


class Advanced:
    """Runs cProfile in every action, without the actions inside of it, and lists the functions of each.

    At the end of a verb the main process prints the lists and writes them as `profile.txt` into the run's directory. It
    makes Python code a few times slower: the numbers tell where time goes, not how much it is without the profiler. An
    object that is given to several verbs adds them up.

    Args:
        top: functions that are listed for each action, >= 1.
        sort: by "cumulative" time (with what is called), "time" (without) or "calls".
        pstats: also write `<action>.pstats` into the directory `profile`, for `python -m pstats` and viewers.

    Raises:
        SettingsError: an argument is not allowed; when the verb begins, if another profiler of Python is running.

    >>> profiler = Advanced(top=3)
    >>> profiler.start("sorting"); _ = sorted(range(5)); profiler.stop("sorting")
    >>> "{built-in method builtins.sorted}" in profiler.summary()
    True
    """

    def __init__(self, top: int = 10, sort: Sort = "cumulative", pstats: bool = False) -> None:
        if isinstance(top, bool) or not isinstance(top, int) or top < 1:
            raise SettingsError(f"profilers.Advanced(top={top!r}); allowed: an integer of at least 1")
        if sort not in get_args(Sort):
            allowed = ", ".join(map(repr, get_args(Sort)))
            raise SettingsError(
                f"profilers.Advanced(sort={sort!r}); allowed: {allowed}{nearest(str(sort), get_args(Sort))}"
            )
        if not isinstance(pstats, bool):
            raise SettingsError(f"profilers.Advanced(pstats={pstats!r}); allowed: True, False")
        self.top, self.sort, self.pstats = top, sort, pstats
        self._profiles: dict[str, cProfile.Profile] = {}
        self._calls: dict[str, int] = {}

    def start(self, action: str) -> None:
        """An action begins; the one around it waits."""
        outer = _running[-1] if _running else None
        if outer is not None:
            outer.disable()
        elif not _running:
            _refuse_other()
        self._calls[action] = self._calls.get(action, 0) + 1
        profile = None
        if action != CALLER:
            profile = self._profiles.get(action)
            if profile is None:
                profile = self._profiles[action] = cProfile.Profile()
        _running.append(profile)
        if profile is not None:
            profile.enable()

    def stop(self, action: str) -> None:
        """The action ends; the one around it goes on.

        Raises:
            LightdecoError: it did not begin.
        """
        if not _running:
            raise LightdecoError(f"profilers.Advanced.stop({action!r}) without start({action!r}) before")
        profile = _running.pop()
        if profile is not None:
            profile.disable()
        outer = _running[-1] if _running else None
        if outer is not None:
            outer.enable()

    def summary(self) -> str:
        """The functions of each action, the longest action first."""
        found = self._stats()
        order = sorted(found, key=lambda action: _seconds(found[action]), reverse=True)
        return "\n\n".join(self._listed(action, found[action]) for action in order) or "nothing was measured"

    def write(self, directory: Path) -> None:
        """Write the `.pstats` files, if they are wanted."""
        if self.pstats:
            (directory / "profile").mkdir(exist_ok=True)
            for action, stats in self._stats().items():
                name = "".join(c if c.isalnum() or c in "._-" else "_" for c in action)
                stats.dump_stats(directory / "profile" / f"{name}.pstats")

    def _stats(self) -> dict[str, pstats.Stats]:
        """What was measured of each action, without this profiler's own calls."""
        found: dict[str, pstats.Stats] = {}
        for action, profile in self._profiles.items():
            if not profile.getstats():
                continue
            stats = pstats.Stats(profile)
            raw = vars(stats)["stats"]
            for key in [key for key in raw if key[0] == __file__ or "_lsprof.Profiler" in key[2]]:
                del raw[key]
            if raw:
                found[action] = stats
        return found

    def _listed(self, action: str, stats: pstats.Stats) -> str:
        output = vars(stats)["stream"] = io.StringIO()
        stats.sort_stats(self.sort).print_stats(self.top)
        lines = [line for line in output.getvalue().splitlines() if line.strip() and "to restriction" not in line]
        listed = "\n".join(lines[2:])  # without the totals and the order
        return f"{action}: {self._calls[action]} calls, {_seconds(stats):.3g} s\n{listed}"


def _seconds(stats: pstats.Stats) -> float:
    """The time in the functions, each without those it calls."""
    return sum(float(row[2]) for row in vars(stats)["stats"].values())


def _refuse_other() -> None:
    """Refuse to run beside another profiler of Python, which would lose its measurement or make ours fail."""
    monitoring = getattr(sys, "monitoring", None)  # from Python 3.12 on
    other = sys.getprofile() is not None or (monitoring is not None and monitoring.get_tool(monitoring.PROFILER_ID))
    if other:
        raise SettingsError(
            "profiler='advanced', but another profiler of Python is running; Python has room for one: end the other"
        )
