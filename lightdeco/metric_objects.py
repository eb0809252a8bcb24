"""The values of logged torchmetrics objects, of the samples of all processes."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

from .group import Group
from .scalars import computed


def values(objects: Mapping[str, Any], everywhere: Sequence[Sequence[str]], group: Group) -> dict[str, float]:
    """Compute and reset each object; all its processes together, and each process gets every value.

    torchmetrics gathers what an object has counted on all processes, and would wait for ever for one that had no batch
    and so never saw the object: then only those that have it are asked.

    Args:
        objects: those that this process has, by the name under which they were logged.
        everywhere: the names that each process has, in the order of ranks.
    """
    found: dict[str, float] = {}
    partial = False
    for name in dict.fromkeys(chain(*everywhere)):  # the same order everywhere
        having = tuple(rank for rank, names in enumerate(everywhere) if name in names)
        among = group.among(having) if len(having) < group.size else None
        partial = partial or among is not None
        if name in objects:
            with _asking(objects[name], among):
                found[name] = computed(name, objects[name])
            objects[name].reset()
    if partial:
        found = {name: value for own in reversed(group.gather(found)) for name, value in own.items()}
    return found


@contextmanager
def _asking(metric: Any, among: Any) -> Iterator[None]:
    """Let an object and those that it is made of gather from these processes, unless their author chose others."""
    parts = [part for part in metric.modules() if hasattr(part, "_defaults") and part.process_group is None]
    for part in parts:
        part.process_group = among
    try:
        yield
    finally:
        for part in parts:
            part.process_group = None
