"""The heads of the loops in what `ld.explain` returns."""

from collections.abc import Iterator

import torch

from . import launch, strategies
from .joined import joined, place
from .settings import Settings
from .zero_config import configuration


def processes_of(s: Settings) -> int:
    """How many processes the run has; devices that are asked for by number need not be there."""
    if joined():
        return place().world_size
    if isinstance(s.devices, (list, tuple)):
        return len(s.devices)
    if s.devices in ("auto", -1):
        gpus = s.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
        return torch.cuda.device_count() if gpus and launch.kind_of(s) == "cuda" else 1
    return s.devices if isinstance(s.devices, int) else 1


def start_text(count: int) -> str:
    """Where the processes of a run come from."""
    if joined():
        return f"this is one of {count} processes that a launcher started; in each of them:"
    return f"start {count} new interpreters, each with a copy of model, data and settings; in each of them:"


def before_manual_step(settings: Settings, processes: int) -> Iterator[str]:
    """What `optimizer.step()` of a manual step does to the gradients."""
    if processes > 1:
        yield f"average its gradients over the {processes} processes"
    if settings.precision == "16-mixed":
        yield "unscale its gradients, unless ld.clip_gradients did; leave the update out where one overflowed in fp16"


def averaged_text(count: int, window: bool) -> str | None:
    """What is done with complete gradients, so that each sample counts the same; None where nothing is."""
    among = f"average the gradients over the {count} processes" + ("" if window else ", in backward")
    what = among if count > 1 else "divide the gradients by the sum of weights" if window else None
    return what and f"{what}, so that each sample counts the same"


def placed(s: Settings) -> Iterator[str]:
    """Where the model goes."""
    devices = "" if s.devices == "auto" else f", devices={s.devices!r}"
    form = "steps under autocast" if s.precision.endswith("-mixed") else "weights and inputs in"
    precision = "" if s.precision == "32-true" else f", {form}: {s.precision}"
    yield f"put the model on its device: accelerator={s.accelerator!r}{devices}{precision}"
    if strategies.name_of(s) == "fsdp":
        yield "cut every parameter into parts, one for each process (FSDP); steps gather them layer by layer"
    if strategies.name_of(s) == "deepspeed":
        stage = configuration(s)["zero_optimization"]["stage"]
        what = ("the optimizer's state", "gradients", "parameters")[:stage]
        yield f"cut {', '.join(what)} into parts, one for each process: DeepSpeed (ZeRO stage {stage})"


def dealt_text(s: Settings, count: int) -> str:
    """How the batches are dealt out."""
    if not s.use_distributed_sampler:
        return "each process reads all that its loaders give"
    return f"process r reads batches r, r + {count}, r + {2 * count}, … of its loaders"


def epochs_text(s: Settings) -> str:
    """The head of the loop over epochs, with what ends it."""
    ends = [] if s.max_epochs is None else [f"{s.max_epochs} are done"]
    if s.fast_dev_run:
        ends = ["1 is done"]
    ends += [] if s.max_steps is None else [f"global_step is {s.max_steps}"]
    ends += [] if s.max_seconds is None else [f"{s.max_seconds:g} s have passed"]
    least = [f"{n}={v}" for n in ("min_epochs", "min_steps") if (v := getattr(s, n)) is not None]
    text = f"for each epoch, until {' or '.join(ends)}"
    return text + (f" (should_stop ends it too, not before {', '.join(least)}):" if least else ":")


def batches_text(s: Settings) -> str:
    """The head of the loop over the batches of an epoch."""
    limit: object = s.limit_train_batches if s.overfit_batches is None else s.overfit_batches
    limit = int(s.fast_dev_run) or limit
    what = "" if limit is None else f" (the first {limit})" if isinstance(limit, int) else f" (a share of {limit})"
    same = ", the same in every epoch" if s.overfit_batches is not None else ""
    return f"for each batch of train_loader{what}{same}:"


def window_text(s: Settings) -> str:
    """How many batches make an update."""
    n = s.accumulate_grad_batches
    return f"{n} batches" if isinstance(n, int) else f"as many batches as {n} says from epoch to epoch"
