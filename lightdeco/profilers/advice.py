"""What a profile says could be faster. Each rule needs its cause in the settings and its cost in the measured times."""

from collections.abc import Iterator, Mapping
from typing import Final

from lightdeco.roles import STAGE_STEP, TRANSFER, VERB_STAGE

from .facts import Facts

#: By action: calls, seconds with what is inside of it, seconds without.
Measured = Mapping[str, tuple[int, float, float]]

#: Shares of a verb's time above which something is worth a change.
_DATA: Final = 0.15
_TRANSFERS: Final = 0.05
_OPTIMIZER: Final = 0.2
_LOOP: Final = 0.1
_RECORDS: Final = 0.05
_VALIDATION: Final = 0.3
_CHECKPOINTS: Final = 0.1
_HOOK: Final = 0.1
#: A step that is shorter than this (seconds) is mostly Python's and the kernels' overhead.
_SHORT: Final = 5e-3
#: Below so many batches the first ones, in which everything is loaded and allocated, decide all times.
_FEW: Final = 10


def seconds(value: float) -> str:
    """A time with three digits.

    >>> seconds(12.345), seconds(0.0123), seconds(4.56e-6)
    ('12.3 s', '12.3 ms', '4.56 µs')
    """
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if value * factor >= 1 or unit == "µs":
            break
    shown = value * factor
    return f"{shown:.0f} {unit}" if shown >= 100 else f"{shown:.3g} {unit}"


def advice(facts: Facts, measured: Measured) -> list[str]:
    """Sentences, the largest share first; empty where nothing applies or too few batches were done.

    >>> slow = {"fit": (1, 10.0, 0.1), "training_step": (100, 4.0, 4.0), "train_data": (101, 5.0, 5.0)}
    >>> from lightdeco.profilers.facts import Source
    >>> print(*advice(Facts("fit", data={"train": Source("DataLoader", 0)}), slow))
    Waiting for train data took 50 % of the time (5 s): DataLoader(num_workers=…) reads in the background; it is 0.
    """
    whole = _total(measured, facts.verb)
    steps = measured.get(STAGE_STEP[VERB_STAGE[facts.verb]], (0, 0.0, 0.0))[0]
    if steps < _FEW or not whole:
        return []
    rules = (_data, _transfer, _optimizer, _batch, _records, _validation, _checkpoints, _hooks)
    found = [pair for rule in rules for pair in rule(facts, measured, whole)]
    return [text for _, text in sorted(found, key=lambda pair: pair[0], reverse=True)]


_Found = Iterator[tuple[float, str]]


def _total(measured: Measured, action: str) -> float:
    return measured.get(action, (0, 0.0, 0.0))[1]


def _took(what: str, part: float, whole: float, more: str = "") -> str:
    return f"{what} took {100 * part / whole:.0f} % of the time ({seconds(part)}{more})"


def _data(facts: Facts, measured: Measured, whole: float) -> _Found:
    for stage, source in facts.data.items():
        part = _total(measured, f"{stage}_data")
        if part <= _DATA * whole:
            continue
        took = _took(f"Waiting for {stage} data", part, whole)
        if source.workers == 0:
            yield part, f"{took}: DataLoader(num_workers=…) reads in the background; it is 0."
        elif source.workers is not None:
            yield part, f"{took} with num_workers={source.workers}: try more workers, or make the samples cheaper."
        else:
            yield (
                part,
                f"{took}: a {source.kind} is read in this process; a torch DataLoader with num_workers reads in the "
                "background.",
            )


def _transfer(facts: Facts, measured: Measured, whole: float) -> _Found:
    part = _total(measured, "transfer_batch_to_device")
    source = facts.data.get(VERB_STAGE[facts.verb])
    if facts.device == "cuda" and source is not None and source.pinned is False and part > _TRANSFERS * whole:
        took = _took("Moving batches to the GPU", part, whole)
        yield part, f"{took}: DataLoader(pin_memory=True) lets the copies run beside the computation."


def _optimizer(facts: Facts, measured: Measured, whole: float) -> _Found:
    part = _total(measured, "optimizer_step")
    if facts.faster is not None and part > _OPTIMIZER * whole:
        took = _took("optimizer_step", part, whole)
        yield part, f"{took}: {facts.optimizer}(…, {facts.faster}) updates many weights at once."


def _batch(facts: Facts, measured: Measured, whole: float) -> _Found:
    part = measured[facts.verb][2]
    step = STAGE_STEP[VERB_STAGE[facts.verb]]
    actions = (step, "backward", "optimizer_step") if facts.verb == "fit" else (step,)
    mean = sum(_total(measured, action) for action in actions) / measured[step][0]
    if part > _LOOP * whole and mean < _SHORT:
        took = _took("The loop itself", part, whole)
        yield part, f"{took}, the work of one batch only {seconds(mean)}: larger batches need fewer rounds."


def _records(facts: Facts, measured: Measured, whole: float) -> _Found:
    if facts.verb != "fit":
        return
    # On other devices the time under `metrics` is mostly that of the steps, which are waited for.
    part = _total(measured, "record") + (_total(measured, "metrics") if facts.device == "cpu" else 0.0)
    by_step = measured["training_step"][0] // facts.log_every
    if part > _RECORDS * whole and by_step >= _FEW:
        took = _took("Making records", part, whole, f", {measured.get('record', (0,))[0]} records")
        yield part, f"{took}: make log_every_n_steps larger; it is {facts.log_every}."


def _validation(facts: Facts, measured: Measured, whole: float) -> _Found:
    calls, part, _ = measured.get("validation", (0, 0.0, 0.0))
    if part > _VALIDATION * whole and calls > 1:
        took = _took("Validation", part, whole, f", {calls} times")
        yield (
            part,
            f"{took}: validate less often (check_val_every_n_epoch, val_check_interval) or on fewer batches "
            "(limit_val_batches).",
        )


def _checkpoints(facts: Facts, measured: Measured, whole: float) -> _Found:
    part = _total(measured, "checkpoint")
    if part > _CHECKPOINTS * whole and facts.checkpoints > 1:
        took = _took("Writing checkpoints", part, whole, f", {facts.checkpoints} of them")
        other = "" if facts.background else ", or in the background (background=True)"
        yield part, f"{took}: write them less often, ModelCheckpoint(every_n_epochs=…, every_n_steps=…){other}."


def _hooks(facts: Facts, measured: Measured, whole: float) -> _Found:
    for action, (calls, part, _) in measured.items():
        event = action.partition(" ")[0]
        if not action.startswith("on_") or part <= _HOOK * whole or calls < _FEW:
            continue
        took = _took(action, part, whole, f", {calls} calls")
        if event in TRANSFER:
            yield part, f"{took}: make it cheaper, or do it in the workers of the data."
        else:
            yield part, f"{took}: make it cheaper, or rarer: @ld.on({event!r}, every=…)."
