"""`Simple`: how often each part of a verb ran, how long it took, and what could be done about it."""

import json
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

from lightdeco.callbacks.progress_layout import shortened
from lightdeco.errors import LightdecoError, SettingsError

from .advice import advice, seconds
from .facts import Facts


class Action(NamedTuple):
    """What was measured of one action. An action that runs inside of itself counts once."""

    calls: int
    total_s: float
    """With all that ran inside of it."""
    own_s: float
    """Without the actions inside of it. Over all actions these sum up to the time of the verb."""

    @property
    def mean_s(self) -> float:
        """Seconds of one call."""
        return self.total_s / self.calls if self.calls else 0.0


class _Node:
    """One action in one place: below the actions in which it runs."""

    __slots__ = ("calls", "children", "name", "parent", "since", "total")

    def __init__(self, name: str, parent: "_Node | None") -> None:
        self.name, self.parent = name, parent
        self.children: dict[str, _Node] = {}
        self.calls, self.total, self.since = 0, 0.0, 0.0

    @property
    def own(self) -> float:
        """Seconds that none of the actions inside took."""
        return max(0.0, self.total - sum(child.total for child in self.children.values()))

    def largest(self) -> list["_Node"]:
        """The actions inside, the longest first."""
        return sorted(self.children.values(), key=lambda child: child.total, reverse=True)


class Simple:
    """Measures every action: calls, mean, total, share of the time of the verb; and gives advice on what it saw.

    At the end of a verb the main process prints a table and writes it as `profile.txt`, and as data in
    `profile.json`, into the run's directory. An object that is given to several verbs adds them up. Actions of one's
    own may be put between `start` and `stop`, from the thread of the loop.

    Args:
        synchronize: wait for the device at the beginning and the end of each action, so that an action's time is that
            of its kernels. Without it times are the host's: what a GPU still has to do is waited for elsewhere, mostly
            under `metrics`. It slows training on a GPU down.

    Raises:
        SettingsError: `synchronize` is no bool.

    >>> profiler = Simple()
    >>> for _ in range(3):
    ...     profiler.start("outer"); profiler.start("inner"); profiler.stop("inner"); profiler.stop("outer")
    >>> {name: action.calls for name, action in profiler.actions.items()}
    {'outer': 3, 'inner': 3}
    """

    def __init__(self, synchronize: bool = False) -> None:
        if not isinstance(synchronize, bool):
            raise SettingsError(f"profilers.Simple(synchronize={synchronize!r}); allowed: True, False")
        self.synchronize = synchronize
        self._now = _when_done if synchronize else perf_counter
        self._root = self._top = _Node("", None)
        self._facts: dict[str, Facts] = {}

    def begin(self, facts: Facts) -> None:
        """A verb begins; `facts` is what advice needs to know of it."""
        self._facts[facts.verb] = facts

    def start(self, action: str) -> None:
        """An action begins, inside of those that have not ended."""
        top = self._top
        node = top.children.get(action)
        if node is None:
            node = top.children[action] = _Node(action, top)
        self._top = node
        node.since = self._now()  # last: what comes before is none of the action's time

    def stop(self, action: str) -> None:
        """The action ends; those inside of it that were not ended, because of an exception, end as well.

        Raises:
            LightdecoError: it did not begin.
        """
        now, node = self._now(), self._top
        if node.name != action:
            node = self._unwound(action, now)
        node.total += now - node.since
        node.calls += 1
        assert node.parent is not None
        self._top = node.parent

    def _unwound(self, action: str, now: float) -> _Node:
        """End what lies inside of the action."""
        inside: list[_Node] = []
        node: _Node | None = self._top
        while node is not None and node.name != action:
            inside.append(node)
            node = node.parent
        if node is None or node.parent is None:
            raise LightdecoError(f"profilers.Simple.stop({action!r}) without start({action!r}) before")
        for each in inside:
            each.total += now - each.since
            each.calls += 1
        return node

    @property
    def actions(self) -> dict[str, Action]:
        """What was measured, by the name of the action, in the order in which they first ended or began."""
        found: dict[str, Action] = {}
        for path in _paths(self._root, ()):
            node, above = path[-1], path[:-1]
            calls, total, own = found.get(node.name, (0, 0.0, 0.0))
            inside_itself = any(other.name == node.name for other in above)
            more = (0, 0.0) if inside_itself else (node.calls, node.total)
            found[node.name] = Action(calls + more[0], total + more[1], own + node.own)
        return found

    def advice(self) -> list[str]:
        """What would make the last verb faster, each with the number that says so; empty where nothing was seen."""
        if not self._facts:
            return []
        facts = list(self._facts.values())[-1]
        verb = self._root.children.get(facts.verb)
        if verb is None:
            return []
        alone = Simple()
        alone._root.children[facts.verb] = verb
        return advice(facts, alone.actions)

    def summary(self, columns: int | None = None) -> str:
        """The table and the advice as text, names cut so that a line has at most so many columns."""
        rows = [row for verb in self._root.largest() for row in _rows(verb, verb.total)]
        if not rows:
            return "nothing was measured"
        cells = [("action", "calls", "mean", "total", "share"), *rows]
        widths = [max(len(row[i]) for row in cells) for i in range(5)]
        if columns is not None:
            widths[0] = max(12, min(widths[0], columns - sum(widths[1:]) - 8))
        lines = [
            "  ".join([shortened(name, widths[0]).ljust(widths[0]), *map(str.rjust, numbers, widths[1:])])
            for name, *numbers in cells
        ]
        given = self.advice()
        return "\n".join([*lines, *(["", "Advice:"] if given else []), *(f"- {line}" for line in given)])

    def write(self, directory: Path) -> None:
        """Write `profile.json`: `{"actions": [{"path": [...], "calls", "total_s", "own_s", "share"}], "advice"}`."""
        actions = [
            {
                "path": [node.name for node in path],
                "calls": path[-1].calls,
                "total_s": path[-1].total,
                "own_s": path[-1].own,
                "share": _share(path[-1].total, path[0].total),
            }
            for path in _paths(self._root, ())
        ]
        content: dict[str, Any] = {"actions": actions, "advice": self.advice()}
        (directory / "profile.json").write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")


def _when_done() -> float:
    """The time when the device has done all that it was given. Waits for the device."""
    import torch

    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return perf_counter()


def _paths(node: _Node, above: tuple[_Node, ...]) -> Iterator[tuple[_Node, ...]]:
    """Each node below this one with those above it, outermost first."""
    for child in node.children.values():
        path = (*above, child)
        yield path
        yield from _paths(child, path)


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _rows(node: _Node, whole: float, depth: int = 0) -> Iterator[tuple[str, str, str, str, str]]:
    """The row of an action, of those inside of it, and of what none of them took; `whole`: the time of the verb."""
    mean = node.total / node.calls if node.calls else 0.0
    yield ("  " * depth + node.name, str(node.calls), seconds(mean), *_shown(node.total, whole))
    for child in node.largest():
        yield from _rows(child, whole, depth + 1)
    if node.children and (depth == 0 or node.own >= 0.0005 * whole):
        name = "itself" if depth else "the loop itself"
        yield ("  " * (depth + 1) + name, "", "", *_shown(node.own, whole))


def _shown(part: float, whole: float) -> tuple[str, str]:
    return seconds(part), f"{100 * _share(part, whole):.1f} %"
