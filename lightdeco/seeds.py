"""Seeds as pure functions, so that a run's position is a few integers and a hand-written loop can repeat it.

All results are 32-bit unsigned integers, because torch's CPU generator drops the rest. A run draws them as follows:

- `order_seed(seed, epoch)` is set right before `iter(loader)`: it decides how a loader shuffles;
- `data_seed(seed, epoch, batch)` is set before each fetch, where the fetch happens (in a worker or not);
- `step_seed(seed, rank, micro_batch)` is set for torch before each call of the training step;
- `eval_seed(seed, loader, batch)` is set for torch before each call of an evaluation step.

    >>> from lightdeco import seeds
    >>> seeds.order_seed(0, epoch=0) == seeds.order_seed(0, epoch=0) != seeds.order_seed(0, epoch=1)
    True
"""

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial, reduce
from itertools import chain, count
from typing import Any

import numpy
import torch

from . import xla

_MASK = 0xFFFF_FFFF_FFFF_FFFF
_ORDER, _DATA, _STEP, _EVAL, _MODULE = 1, 2, 3, 4, 5


def _absorb(state: int, value: int) -> int:
    """Mix an integer into a state of 64 bits with the finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    state = (state * 0x9E37_79B9_7F4A_7C15 + value + 0x632B_E59B_D9B4_E019) & _MASK
    state = ((state ^ (state >> 30)) * 0xBF58_476D_1CE4_E5B9) & _MASK
    state = ((state ^ (state >> 27)) * 0x94D0_49BB_1331_11EB) & _MASK
    return state ^ (state >> 31)


def _mix(stream: int, *values: int) -> int:
    """Hash a few integers to 32 bits."""
    return reduce(_absorb, values, stream) & 0xFFFF_FFFF


def order_seed(seed: int, epoch: int) -> int:
    """The seed of the order of the data in one epoch (32 bits).

    A hand-written loop repeats a run's order with `torch.manual_seed(order_seed(seed, epoch))` right before
    `for batch in loader`.
    """
    return _mix(_ORDER, seed, epoch)


def data_seed(seed: int, epoch: int, batch: int) -> int:
    """The seed of what is random while batch `batch` of the epoch is fetched and collated (32 bits).

    `batch` counts in the order of one process: batch `k` of rank `r` is `k * world_size + r`.
    """
    return _mix(_DATA, seed, epoch, batch)


def step_seed(seed: int, rank: int, micro_batch: int) -> int:
    """The seed of torch's randomness in a training step (32 bits); `micro_batch` counts over the whole run."""
    return _mix(_STEP, seed, rank, micro_batch)


def step_seeds(seed: int, rank: int, first: int) -> Iterator[int]:
    """`step_seed` of the micro-batch `first` and all that follow; worked out 64 at a time, which is faster.

    >>> next(step_seeds(3, 0, first=100)) == step_seed(3, 0, 100)
    True
    """
    return chain.from_iterable(map(partial(_chunk, seed, rank), count(first, 64)))


def _chunk(seed: int, rank: int, first: int) -> list[int]:
    state = _absorb(_absorb(_STEP, seed), rank)  # what all of them have in common
    return [_absorb(state, micro_batch) & 0xFFFF_FFFF for micro_batch in range(first, first + 64)]


def eval_seed(seed: int, loader: int, batch: int) -> int:
    """The seed of torch's randomness in a validation, test or predict step (32 bits).

    It does not depend on the epoch: two validations of the same weights give the same numbers.
    """
    return _mix(_EVAL, seed, loader, batch)


def module_seed(seed: int, number: int) -> int:
    """The seed of the values that the `number`-th module of a model gets when it was built on the meta device."""
    return _mix(_MODULE, seed, number)


def seed_all(seed: int) -> None:
    """Seed torch, NumPy and `random` alike. Costs about 8 µs on a CPU."""
    torch.default_generator.manual_seed(seed)
    numpy.random.seed(seed)
    random.seed(seed)


def seed_everything(seed: int) -> int:
    """Seed torch (all devices), NumPy and `random` in this process, and return the seed.

    For what is random outside a verb, such as the initial weights of a model. `seed` is from 0 to 2**32 - 1.

    Raises:
        SettingsError: the seed is no such integer.

    >>> import torch, lightdeco as ld
    >>> _ = ld.seed_everything(1); a = torch.rand(1); _ = ld.seed_everything(1); bool(a == torch.rand(1))
    True
    """
    from .errors import SettingsError

    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise SettingsError(f"seed is {seed!r}; allowed: an integer from 0 to 2**32 - 1")
    torch.manual_seed(seed)
    xla.set_rng_state(seed)
    numpy.random.seed(seed)
    random.seed(seed)
    return seed


def random_state() -> dict[str, Any]:
    """The random state of torch (every CUDA device, once they are in use), NumPy and `random`, as plain values."""
    name, *rest = numpy.random.get_state()
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "numpy": [name, *rest], "random": random.getstate()}
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = torch.cuda.get_rng_state_all()
    if (of_xla := xla.rng_state()) is not None:
        state["xla"] = of_xla
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Put back what `random_state` gave; the states of CUDA devices only where there are as many."""
    torch.set_rng_state(state["torch"])
    numpy.random.set_state(tuple(state["numpy"]))
    random.setstate(state["random"])
    if "cuda" in state and torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    xla.set_rng_state(state.get("xla"))


@contextmanager
def preserved() -> Iterator[None]:
    """Put the random state of torch (every device that is in use), NumPy and `random` back at the end."""
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)


def reseeder(device: torch.device) -> Callable[[int], object]:
    """The cheapest way to seed torch for work on one device: its own generator and the CPU's."""
    if device.type == "cpu":
        return torch.default_generator.manual_seed  # 1 µs; torch.manual_seed visits every backend and costs 97 µs
    if device.type == "cuda":
        generator = torch.cuda.default_generators[device.index or 0]

        def both(seed: int) -> None:
            torch.default_generator.manual_seed(seed)
            generator.manual_seed(seed)

        return both
    return xla.reseeder() if device.type == "xla" else torch.manual_seed


def repeater(device: torch.device) -> Callable[[], None]:
    """A function that puts torch's generators (the CPU's and the device's) back to where they are now. Waits."""
    state = torch.get_rng_state()
    module = None if device.type in ("cpu", "xla") else torch.get_device_module(device)
    of_device, of_xla = None if module is None else module.get_rng_state(), xla.rng_state()

    def again() -> None:
        torch.set_rng_state(state)
        if module is not None:
            module.set_rng_state(of_device)
        xla.set_rng_state(of_xla)

    return again
