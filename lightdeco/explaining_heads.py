"""The heads of the loops in what `ld.explain` returns."""

from .settings import Settings


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
