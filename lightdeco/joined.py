"""Whether a launcher started this process as one of several (torchrun, accelerate, srun), and as which one.

torchrun and `accelerate launch` set `RANK`, `LOCAL_RANK`, `WORLD_SIZE`, `MASTER_ADDR`, `MASTER_PORT`; those count
first. Slurm's srun sets variables of its own, from which `join` makes torchrun's.
"""

import functools
import os
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final, NamedTuple, ParamSpec, TypeVar

from .errors import LaunchError
from .errors import rank as rank

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

P = ParamSpec("P")
R = TypeVar("R")

_TORCHRUN: Final = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Place(NamedTuple):
    """Which process of a run this is: ranks among all and on this node, sizes, and where rank 0 listens."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    address: str = "127.0.0.1"
    port: int = 0

    def variables(self) -> dict[str, str]:
        """The place as torchrun's variables."""
        return {
            "RANK": str(self.rank),
            "LOCAL_RANK": str(self.local_rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_WORLD_SIZE": str(self.local_world_size),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port),
        }


def joined(variables: Mapping[str, str] = os.environ) -> bool:
    """Whether a launcher started this process as one of several.

    >>> joined({"RANK": "0", "WORLD_SIZE": "2"}), joined({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"})
    (True, False)
    """
    return _number(variables, "WORLD_SIZE", 1) > 1 or _by_srun(variables)


def place(variables: Mapping[str, str] = os.environ) -> Place:
    """Which process of the run this is; rank 0 of 1 in a process on its own. Changes nothing.

    Raises:
        LaunchError: a variable that the launcher should have set is missing or no number.
    """
    if _number(variables, "WORLD_SIZE", 1) > 1:
        return _by_torchrun(variables)
    return _slurm_place(variables) if _by_srun(variables) else Place()


def join() -> Place:
    """`place()`, with torchrun's variables set in this process where only srun's are."""
    found = place()
    if found.world_size > 1:
        os.environ.update(found.variables())
    return found


_store: "Store | None" = None
_groups = 0


def group_store() -> "Store":
    """A store for the next process group of this process; all ranks open their groups in the same order.

        place = join()
        dist.init_process_group("gloo", store=group_store(), rank=place.rank, world_size=place.world_size)

    With `env://` alone, a second group in one process reads the addresses that the first one left in the store, and
    hangs or is refused at random, under torchrun too. Here each group has keys of its own in one store.
    """
    from torch.distributed import PrefixStore, rendezvous  # type: ignore[attr-defined]

    global _store, _groups
    if _store is None:
        _store = next(iter(rendezvous("env://")))[0]
    _groups += 1
    return PrefixStore(f"lightdeco/{_groups}", _store)


def _number(variables: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = variables.get(name, "")
    if not text and default is not None:
        return default
    if not text.strip().isdecimal():
        raise LaunchError(
            f"the variable {name}={text!r} of the launcher is no number; unset it, or set all of torchrun's"
        )
    return int(text)


def _by_torchrun(variables: Mapping[str, str]) -> Place:
    missing = [name for name in _TORCHRUN if not variables.get(name)]
    if missing:
        raise LaunchError(
            f"WORLD_SIZE={variables['WORLD_SIZE']} says that this process is one of several, but {', '.join(missing)} "
            "not set; start it with torchrun, accelerate launch or srun, or unset WORLD_SIZE"
        )
    rank, size = _number(variables, "RANK"), _number(variables, "WORLD_SIZE")
    if rank >= size:
        raise LaunchError(f"RANK={rank} with WORLD_SIZE={size}; ranks count from 0 to {size - 1}")
    return Place(
        rank,
        _number(variables, "LOCAL_RANK"),
        size,
        _number(variables, "LOCAL_WORLD_SIZE", size),
        variables["MASTER_ADDR"],
        _number(variables, "MASTER_PORT"),
    )


# ---- Slurm -----------------------------------------------------------------------------------------------------------


def _by_srun(variables: Mapping[str, str]) -> bool:
    """Whether srun started this very process as one of several tasks.

    `SLURM_NTASKS` says what the job asked for, and is there in an sbatch script and an salloc shell too, where one
    process runs; `SLURM_STEP_NUM_TASKS` is set by srun alone. `srun -n 4 --pty bash` sets it too, and runs one shell on
    a terminal. `SLURM_PTY_PORT` and the job's name are no evidence alone: an srun within that shell inherits both.
    """
    if not variables.get("SLURM_PROCID") or _number(variables, "SLURM_STEP_NUM_TASKS", 1) < 2:
        return False
    return "SLURM_PTY_PORT" not in variables or not any(os.isatty(stream) for stream in range(3))


def _slurm_place(variables: Mapping[str, str]) -> Place:
    nodes = hosts(variables.get("SLURM_STEP_NODELIST") or variables.get("SLURM_JOB_NODELIST", ""))
    address = variables.get("MASTER_ADDR") or (nodes[0] if len(nodes) > 1 else "127.0.0.1")
    size, node = _number(variables, "SLURM_STEP_NUM_TASKS"), _number(variables, "SLURM_NODEID", 0)
    counts = tasks_per_node(variables.get("SLURM_STEP_TASKS_PER_NODE", ""))
    # Every process of a step must come to the same port, and steps of one job to different ones; below 32768, from
    # where on the kernel hands out ports by itself.
    job, step = _number(variables, "SLURM_JOB_ID", 0), _number(variables, "SLURM_STEP_ID", 0)
    return Place(
        _number(variables, "SLURM_PROCID"),
        _number(variables, "SLURM_LOCALID"),
        size,
        counts[node] if node < len(counts) else size,
        address,
        _number(variables, "MASTER_PORT", 10_000 + (job * 61 + step) % 20_000),
    )


def hosts(nodelist: str) -> list[str]:
    """The names in a node list of Slurm, in order.

    Raises:
        LaunchError: the list is written in a way that Slurm does not write.

    >>> hosts("gpu[01-03,07],login,r[1-2]n[5,6]")
    ['gpu01', 'gpu02', 'gpu03', 'gpu07', 'login', 'r1n5', 'r1n6', 'r2n5', 'r2n6']
    """
    found: list[str] = []
    for entry in re.findall(r"(?:\[[^\]]*\]|[^,\[])+", nodelist):
        names = [""]
        for text, ranges in re.findall(r"([^\[\]]+)|\[([^\]]*)\]", entry):
            names = [name + end for name in names for end in ([text] if text else _numbers(ranges, nodelist))]
        found += names
    return found


def _numbers(ranges: str, nodelist: str) -> list[str]:
    """ "01-03,07" -> 01, 02, 03, 07."""
    found: list[str] = []
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        if not first.isdecimal() or not (last or first).isdecimal():
            raise LaunchError(
                f"Slurm's node list {nodelist!r} cannot be read; set MASTER_ADDR to the first node's name"
            )
        found += [str(n).zfill(len(first)) for n in range(int(first), int(last or first) + 1)]
    return found


def tasks_per_node(text: str) -> list[int]:
    """`SLURM_STEP_TASKS_PER_NODE` as one number per node.

    >>> tasks_per_node("4(x2),3")
    [4, 4, 3]
    """
    return [int(n) for n, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text) for _ in range(int(times or 1))]


# ---- ranks -----------------------------------------------------------------------------------------------------------


def rank_zero_only(function: Callable[P, R]) -> Callable[P, R | None]:
    """Call the function on rank 0 alone; on other ranks the call does nothing and returns None.

    >>> import lightdeco as ld
    >>> @ld.rank_zero_only
    ... def greet(): return "hello"
    >>> greet()
    'hello'
    """

    @functools.wraps(function)
    def on_rank_zero(*args: P.args, **kwargs: P.kwargs) -> R | None:
        return function(*args, **kwargs) if rank() == 0 else None

    return on_rank_zero
