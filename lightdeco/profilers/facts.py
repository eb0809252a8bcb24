"""What a profiler is told of a verb, for its advice: nothing that would keep loaders, weights or an optimizer alive."""

import inspect
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from torch.optim import Optimizer
from torch.utils.data import DataLoader

from lightdeco.data import CombinedLoader
from lightdeco.optim import parameters_of

if TYPE_CHECKING:
    from lightdeco.data.loader import Loader
    from lightdeco.session import Session


@dataclass
class Source:
    """How the data of one stage is read."""

    kind: str
    """The class of the loader."""
    workers: int | None = None
    """Of a DataLoader (of several: the fewest)."""
    pinned: bool | None = None
    """Whether a DataLoader (each of several) pins its batches."""


@dataclass
class Facts:
    """What a profiler is told of a verb when it begins."""

    verb: str
    device: str = "cpu"
    """The type of the device."""
    directory: Path | None = None
    """The run's directory."""
    data: dict[str, Source] = field(default_factory=dict)
    """By stage."""
    optimizer: str = ""
    """The class of the optimizer."""
    faster: str | None = None
    """An argument that the optimizer takes and was not given, which makes its step faster."""
    log_every: int = 50
    background: bool = False
    """Whether checkpoints are written in the background."""
    checkpoints: int = 0
    """How many checkpoints were written so far."""


def gather(s: "Session") -> Facts:
    """The facts of a verb that is set up."""
    facts = Facts(s.plan.verb, s.run.device.type, s.run.dir if s.run.has_dir else None)
    facts.log_every = s.settings.log_every_n_steps
    facts.data = {stage: _source(several) for stage, several in s.loaders.items()}
    if s.plan.verb == "fit":
        optimizer = next(iter(s.run.optims.values())).optimizer
        facts.optimizer, facts.faster = type(optimizer).__name__, _faster(optimizer, facts.device)
    if s.saver is not None:
        facts.background = s.saver.policy.background
    return facts


def _source(several: "tuple[Loader, ...]") -> Source:
    given = [getattr(loader._source, "_loader", getattr(loader._source, "_given", None)) for loader in several]
    parts = [part for one in given for part in (one.parts if isinstance(one, CombinedLoader) else [one])]
    read = [part for part in parts if isinstance(part, DataLoader)]
    if not read or len(read) < len(parts):
        return Source(type(next((part for part in parts if part not in read), None)).__name__)
    return Source(type(read[0]).__name__, min(one.num_workers for one in read), all(one.pin_memory for one in read))


def _faster(optimizer: Optimizer, device: str) -> str | None:
    """The argument that would make `optimizer.step` faster here, if the optimizer takes one that was not given."""
    taken = inspect.signature(type(optimizer).__init__).parameters
    chosen = {name for name in ("fused", "foreach") for group in optimizer.param_groups if group.get(name)}
    special = any(group.get(name) for name in ("capturable", "differentiable") for group in optimizer.param_groups)
    if chosen or special:
        return None
    floating = all(p.is_floating_point() and p.device.type == device for p in parameters_of(optimizer))
    if "fused" in taken and floating and device in (("cpu",) if "lr_decay" in taken else ("cpu", "cuda", "mps")):
        return "fused=True"  # Adagrad, the one with lr_decay, has it on the CPU alone
    refused = any(group.get("foreach") is False for group in optimizer.param_groups)
    return "foreach=True" if "foreach" in taken and (device == "cpu" or refused) else None
