"""The verbs and the loop, in the order of time.

    fit:
        configure_callbacks
        prepare_data; setup("fit")
        configure_model; configure_accelerator
        train_dataloader; val_dataloader
        configure_optimizers
        on_load_checkpoint                                 (of a run that is resumed)
        on_fit_start
        on_sanity_check_start; [evaluate a few batches, recording nothing]; on_sanity_check_end
        on_train_start
        for each epoch:
            on_train_epoch_start
            for each batch:
                on_before_batch_transfer; transfer_batch_to_device; on_after_batch_transfer
                on_train_batch_start                       (may return SKIP_EPOCH)
                split_batch
                for each training step that is due, for each part of the batch:    (most runs: one step, one part)
                    at the start of a window:
                        on_before_zero_grad; optimizer_zero_grad
                    training_step                          (torch seeded by `seeds.step_seed` before the first)
                    on_before_backward; backward; on_after_backward
                    at the end of a window:
                        on_before_optimizer_step; clip_gradients; optimizer_step
                        lr_scheduler_step                  (schedulers by step)
                on_train_batch_end                         (global_step counts this batch)
                [record, every log_every_n_steps]
                [evaluate, every val_check_interval]
                on_save_checkpoint; [save, when it is due]
            [evaluate]
            on_train_epoch_end
            [record the epoch]
            lr_scheduler_step                              (schedulers by epoch)
            [save, when it is due]
        [save]
        on_train_end
        on_fit_end
        teardown("fit")

    evaluate ("validation", "test" or "predict" for *):
        on_*_start
        on_*_epoch_start
        for each loader, for each batch:
            on_before_batch_transfer; transfer_batch_to_device; on_after_batch_transfer
            on_*_batch_start; *_step; on_*_batch_end
        on_*_epoch_end
        [record]
        on_*_end

Where an exception ends a verb, `on_exception` comes before `teardown`.
"""

from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from functools import partial
from itertools import chain, islice, pairwise, repeat
from typing import TYPE_CHECKING, Any, Final

from torch import nn

from . import elsewhere, launch, seeds
from .child import beat
from .counted import kept
from .current import active
from .data import batch_size_of
from .data.loader import Loader
from .errors import DataError
from .limits import Limits, accumulation, cut, expected, val_interval
from .metrics import Means
from .opening import opened, reload
from .plan import Plan
from .preparing import prepare, warn_without_effect
from .roles import SKIP_EPOCH, STAGE_STEP
from .run import Run
from .session import Session
from .settings import Settings, resolve
from .stepping import log_result, step_schedulers, train_batch, update
from .steps import evaluating, no_grad, read_result

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .resuming import Weights
    from .settings import Overrides


#: What stands for * in the events of each stage's evaluation.
_EVENT: Final = {"val": "validation", "test": "test", "predict": "predict"}

#: The events of a training batch, but for the update's.
_TRAIN_BATCH: Final = (
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_train_batch_end",
)

_END: Final = object()


# ---- the verbs -------------------------------------------------------------------------------------------------------


def fit(
    model: nn.Module, data: Any = None, *, settings: Settings | None = None, **overrides: "Unpack[Overrides]"
) -> Run:
    """Train a module by its marked methods, and return the `Run`; the model then holds the trained weights.

    Args:
        model: a `torch.nn.Module` with a `@training_step` and a `@configure_optimizers`.
        data: a marked data object; a `DataLoader` or any iterable of batches; `(train, val)`; a dict with "train",
            "val"; or nothing, when the model marks its loaders.
        settings: a `Settings`; single ones are given or replaced as keywords.

    Raises:
        MarkError, SettingsError, DataError, LoggerError, LaunchError: before the first batch.
        StepError: a step returned something else than its role returns, or a loss that is not finite.

    Exceptions of the model's own code reach the caller unchanged.
    """
    resolved = resolve(settings, overrides)
    plan, given = prepare("fit", model, data, resolved)
    if (processes := launch.count(resolved, plan)) > 1:
        return elsewhere.fit(fit, plan, model, data, resolved, processes)
    writes = not resolved.fast_dev_run
    with opened(plan, given, resolved, writes) as s, s.process.entered(), active(s.run), s.signals.caught():
        run, call = s.run, s.call
        limits = Limits(resolved, s.peers, s.finished)
        interval = val_interval(resolved, "val" in s.loaders, run.num_train_batches)
        call["on_fit_start"]()
        if s.checks_sanity():
            _sanity_check(s)
        run.stage, run.means = "train", s.means
        call["on_train_start"]()
        while (reason := limits.between_epochs()) is None:
            reload(s)
            call["on_train_epoch_start"]()
            if _train_epoch(s, limits, interval):
                _end_epoch(s, interval)
        run.stop_reason = reason
        _save_at_the_end(s)
        if run.progress.batch:  # an epoch was cut short
            _record_window(s)
            run.means.forget()
        call["on_train_end"]()
        call["on_fit_end"]()
    return run


def validate(
    model: nn.Module,
    data: Any = None,
    *,
    weights: "Weights" = None,
    settings: Settings | None = None,
    **overrides: "Unpack[Overrides]",
) -> dict[str, float]:
    """Run `@validation_step` over the validation data and return its metrics.

    `weights`: "best", "last" or the path of a checkpoint, which is loaded into the model; by default the model's own.
    """
    return _evaluation("validate", model, data, weights, settings, overrides)


def test(
    model: nn.Module,
    data: Any = None,
    *,
    weights: "Weights" = None,
    settings: Settings | None = None,
    **overrides: "Unpack[Overrides]",
) -> dict[str, float]:
    """Run `@test_step` over the test data and return its metrics; `weights` as in `validate`."""
    return _evaluation("test", model, data, weights, settings, overrides)


vars(test)["__test__"] = False  # pytest must not collect it


def _evaluation(
    verb: str, model: nn.Module, data: Any, weights: "Weights", settings: Settings | None, overrides: Any
) -> dict[str, float]:
    resolved = resolve(settings, overrides)
    warn_without_effect(verb, overrides)
    plan, given = prepare(verb, model, data, resolved)
    writes = bool(overrides.get("logger"))  # an evaluation writes files only when it is asked to, in this very call
    if (processes := launch.count(resolved, plan)) > 1:
        values: dict[str, float] = elsewhere.evaluate(
            validate if verb == "validate" else test, plan, data, weights, resolved, processes, writes
        )
        return values
    with opened(plan, given, resolved, writes, weights) as s, s.process.entered(), active(s.run):
        return _evaluate(s, "val" if verb == "validate" else "test")


def predict(
    model: nn.Module,
    data: Any = None,
    *,
    weights: "Weights" = None,
    settings: Settings | None = None,
    **overrides: "Unpack[Overrides]",
) -> Iterator[Any]:
    """Yield what `@predict_step` returns for each batch, in the order of the data, holding one batch at a time.

    Where it starts processes, it returns all of it when they have ended; in processes of a launcher, each yields all.
    The arguments are checked at the call; nothing runs before the first output is asked for. Left half-way, the
    generator releases its workers. `weights` as in `validate`.
    """
    resolved = resolve(settings, overrides)
    warn_without_effect("predict", overrides)
    plan, given = prepare("predict", model, data, resolved)
    if (processes := launch.count(resolved, plan)) > 1:
        return iter(elsewhere.evaluate(predict, plan, data, weights, resolved, processes))
    return _predict(plan, given, resolved, weights)


# ---- training --------------------------------------------------------------------------------------------------------


def _train_epoch(s: Session, limits: Limits, interval: int | None) -> bool:
    """Train one epoch; False when it was stopped before its end."""
    run, progress, settings = s.run, s.run.progress, s.settings
    branch, parted, (loader,) = s.branches[0], s.parted, s.loaders["train"]
    # Looked up once: between two steps the caches are cold, and a look-up costs as much as a small kernel.
    optimizer: Any = None if parted else branch.optimizer
    where = branch.hook.where
    reseed, transfer, step, zero_grad, backward = s.reseed, s.transfer, branch.step, branch.zero_grad, branch.backward
    on_start, on_before_zero, on_before, on_after, on_end = (s.heard(name) for name in _TRAIN_BATCH)
    plain, log_every, losses = s.plain_update, settings.log_every_n_steps, run.means.series[f"{branch.prefix}loss"]
    size, skipped, saver = accumulation(settings, progress.epoch), False, s.saver
    s.begin_windows()
    window, single = branch.window, branch.window.plain
    s.first_micro_batch = progress.micro_batch - progress.batch
    if s.validation_due(interval):  # a resumed run may have been stopped before it
        _evaluate(s, "val")
    with closing(loader.batches(0 if settings.overfit_batches else progress.epoch, progress.batch)) as batches:
        left = s.peers.together(islice(batches, cut(settings, loader, "train", progress.batch)))
        step_seeds = seeds.step_seeds(run.seed, run.rank, progress.micro_batch)
        for batch, dataloader_idx, last, seed in _numbered(left, loader, size > 1, step_seeds, progress.batch > 0):
            batch_idx = progress.batch
            run.batch, run.batch_idx = batch, batch_idx
            if transfer is not None:
                reseed(seed)
                run.batch = batch = transfer(batch, run.device, dataloader_idx)
            if on_start is not None and on_start(batch, batch_idx, dataloader_idx) is SKIP_EPOCH:
                skipped, run.batch = True, None
                break
            if parted:
                progress.batch += 1
                outputs, updated = train_batch(s, batch, batch_idx, dataloader_idx, last, seed)
            else:
                if window.count == 0:
                    if on_before_zero is not None:
                        on_before_zero(optimizer)
                    zero_grad()
                if size > 1:
                    window.coming(last)
                reseed(seed)
                outputs = step("training_step", batch, batch_idx, dataloader_idx, None)
                loss, scalars, metrics, weight, samples = read_result(outputs, where, training=True)
                if weight is None:
                    weight = samples or batch_size_of(batch) or run.size_of_batch()
                scaled = loss if single else window.scale(loss, weight, last)
                if on_before is not None:
                    on_before(scaled, optimizer)
                backward(scaled)
                if on_after is not None:
                    on_after(optimizer)
                losses.add(loss, weight)
                if scalars or metrics:
                    log_result(run, "train/", scalars, metrics, weight)
                progress.batch += 1  # before the update: after an error in it, nothing can be saved
                updated = single or window.complete(last)
                if plain and updated:
                    if not single:
                        window.finish(optimizer)
                    optimizer.step()
                    progress.global_step += 1
                elif updated:
                    updated = update(s, branch, scaled, (batch, batch_idx, dataloader_idx, None), partial(reseed, seed))
            if on_end is not None:
                on_end(batch, batch_idx, dataloader_idx, outputs)
            run.batch = None
            progress.micro_batch += 1

            if updated and progress.global_step % log_every == 0:
                _record_window(s)
            elif updated and progress.global_step >= s.checked_step + 50:
                s.refuse_nan()
            if window.count == 0 and not (parted and s.pending):
                if s.signals.received is None and s.validation_due(interval):  # a signal would end it half-way
                    _evaluate(s, "val")
                if saver is not None:
                    saver.boundary()
                if limits.reached() is not None:
                    return progress.batch == run.num_train_batches and s.signals.received is None
    if progress.batch == 0 and not skipped:
        raise _empty(f"train loader yielded no batch in epoch {progress.epoch}", used_up=progress.epoch > 0)
    return True


def _empty(what: str, used_up: bool) -> DataError:
    again = "; an iterator can be read only once: give a list or a DataLoader" if used_up else ""
    return DataError(f"the {what}{again}")


def _numbered(
    batches: Iterator[Any], loader: Loader, look_ahead: bool, step_seeds: Iterator[int], resumed: bool
) -> Iterator[tuple[Any, int, bool, int]]:
    """(batch, dataloader_idx, whether it is the last, seed); one is read ahead where the last must be known as such."""
    if look_ahead or loader.several:
        following: Iterator[Any] = ((batch, loader.dataloader_idx) for batch in batches)
        if look_ahead and resumed:  # the first one was read before the checkpoint was written: NumPy's state is newer
            with seeds.preserved():
                first = list(islice(following, 1))
            following = chain(first, following)
        pairs = pairwise(chain(following, (None,))) if look_ahead else zip(following, repeat(()))
        return ((batch, index, after is None, next(step_seeds)) for (batch, index), after in pairs)
    return zip(batches, repeat(0), repeat(False), step_seeds, strict=False)  # the seeds never end


def _end_epoch(s: Session, interval: int | None) -> None:
    run, call, progress = s.run, s.call, s.run.progress
    s.refuse_nan()
    if s.saver is not None:
        s.saver.epoch_ends()
    means = run.means.epoch(suffix="_epoch")
    if interval is None and s.validates():
        _evaluate(s, "val")
    s.first_micro_batch = None
    latest = {name.removesuffix("_epoch"): value for name, value in means.items()}
    run.show(means | latest)
    with run.collecting(means):
        call["on_train_epoch_end"]()
    run.record("train", means)
    run.show(latest)
    step_schedulers(s)
    progress.epoch += 1
    progress.batch = progress.validated = s.checked_batch = 0
    s.first_micro_batch = progress.micro_batch
    s.refuse_no_progress()
    if s.saver is not None:
        s.saver.boundary(progress.epoch)


def _save_at_the_end(s: Session) -> None:
    """The last checkpoint; after a signal, the end of the process."""
    if s.signals.received is None:
        s.finished, s.signals.requeues = s.run.stop_reason, None
    s.peers.align(s.run.model)  # DDP gives the others the buffers of rank 0 before a step, so that the last ones differ
    if s.saver is not None:
        s.saver.finish()
    s.held.gather()
    s.signals.end()


def _record_window(s: Session) -> None:
    values, bad = s.run.means.window_and(s.bad())
    s.refuse(bad)
    s.run.record("train", values)


# ---- evaluation ------------------------------------------------------------------------------------------------------


def _sanity_check(s: Session) -> None:
    """Run a few batches of validation before training: its events fire and see its metrics, but it leaves no trace."""
    s.call["on_sanity_check_start"]()
    with seeds.preserved(), s.run.forgetting():
        _evaluate(s, "val", sanity=True)
    s.call["on_sanity_check_end"]()


def _evaluate(s: Session, stage: str, sanity: bool = False) -> dict[str, float]:
    """One pass over the loaders of a stage; returns its metrics, recorded unless this is the sanity check."""
    run, call, event = s.run, s.call, f"on_{_EVENT[stage]}"
    s.refuse_nan()
    s.peers.align(run.model)
    means = Means(run.device, elsewhere=run.means, group=s.group)
    with run.during("sanity" if sanity else stage, means), evaluating(run.model):
        run.num_eval_batches = expected(s.settings, s.loaders[stage], stage, sanity)
        run.eval_loaders = tuple(loader.name for loader in s.loaders[stage])
        call[f"{event}_start"]()
        call[f"{event}_epoch_start"]()
        for index, loader in enumerate(s.loaders[stage]):
            limit, batch_idx = cut(s.settings, loader, stage, sanity=sanity), -1
            with closing(loader.batches(run.epoch)) as batches:
                for batch, own in s.peers.rounds(islice(batches, limit)):
                    if own:
                        batch_idx += 1
                        _evaluate_batch(s, stage, batch, batch_idx, index)
                    else:
                        _accompany(s, stage, batch, index)
                    s.signals.end()
            if batch_idx < 0 and limit != 0 and run.is_main:  # of several processes, the first has one if any has
                name = f" {loader.name!r}" if loader.name else ""
                raise _empty(f"{stage} loader{name} yielded no batch", loader.one_shot)
        values = means.epoch()
        run.show(values)
        with run.collecting(values):
            call[f"{event}_epoch_end"]()
        if sanity:
            run.show(values)
        else:
            run.record(stage, values)
        call[f"{event}_end"]()
    if not sanity:
        run.progress.validated = run.progress.batch
        if s.saver is not None:
            s.saver.validated(values)
        s.peers.agree()
    return values


def _evaluate_batch(s: Session, stage: str, batch: Any, batch_idx: int, index: int) -> Any:
    """One batch of validation, test or prediction; returns what the step returned."""
    run, call, event, role = s.run, s.call, f"on_{_EVENT[stage]}", STAGE_STEP[stage]
    run.batch, run.batch_idx, run.place = batch, batch_idx, (index << 32) + batch_idx
    beat(run.global_step, _EVENT[stage])
    seed = seeds.eval_seed(run.seed, index, batch_idx * run.world_size + run.rank)
    with no_grad(s.inference, run.device):
        if s.transfer is not None:
            s.reseed(seed)
            run.batch = batch = s.transfer(batch, run.device, index)
        call[f"{event}_batch_start"](batch, batch_idx, index)
        s.reseed(seed)
        outputs = s.steps(role, batch, batch_idx, index)
        if stage != "predict":
            name = s.loaders[stage][index].name
            loss, scalars, metrics, weight, samples = read_result(outputs, s.where(role))
            scalars = scalars if loss is None else [("loss", loss), *scalars]
            if scalars and weight is None:
                weight = samples or run.size_of_batch()
            log_result(run, f"{stage}/" if name is None else f"{stage}/{name}/", scalars, metrics, weight)
        call[f"{event}_batch_end"](batch, batch_idx, index, outputs)
    run.batch = None
    return outputs


def _accompany(s: Session, stage: str, batch: Any, index: int) -> None:
    """Take part in a batch of another process, which has more of them: a sharded model is gathered from all.

    Nothing of it is kept.
    """
    run = s.run
    with run.forgetting(), run.during("sanity", Means(run.device)), kept(run.model), no_grad(False, run.device):
        if s.transfer is not None:
            batch = s.transfer(batch, run.device, index)
        run.batch = batch
        s.steps(STAGE_STEP[stage], batch, 0, index)


def _predict(plan: Plan, given: Mapping[str, object], settings: Settings, weights: "Weights") -> Iterator[Any]:
    """The generator of `predict`: inside the run while a batch is worked on, outside while the caller has the floor."""
    with opened(plan, given, settings, writes=False, weights=weights) as s:
        with _inside(s):
            s.run.num_eval_batches = expected(settings, s.loaders["predict"], "predict")
            s.run.eval_loaders = tuple(loader.name for loader in s.loaders["predict"])
            s.call["on_predict_start"]()
            s.call["on_predict_epoch_start"]()
        for index, loader in enumerate(s.loaders["predict"]):
            with closing(loader.batches(0)) as batches:
                rounds, batch_idx = s.peers.rounds(islice(batches, cut(settings, loader, "predict"))), -1
                while True:
                    with _inside(s):
                        batch, mine = next(rounds, (_END, False))
                        own: list[Any] = []
                        if mine:
                            batch_idx += 1
                            own = [_evaluate_batch(s, "predict", batch, batch_idx, index)]
                        elif batch is not _END:
                            _accompany(s, "predict", batch, index)
                        outputs = [each for part in s.group.gather(own) for each in part]
                    if not outputs:
                        break
                    del batch, own  # not held while the next batch is read
                    while outputs:
                        yield outputs.pop(0)
        with _inside(s):
            s.call["on_predict_epoch_end"]()
            s.call["on_predict_end"]()


@contextmanager
def _inside(s: Session) -> Iterator[None]:
    """The process as `predict` needs it, between two outputs that it hands to the caller."""
    with s.process.entered(), active(s.run), s.run.during("predict", Means(s.run.device)), evaluating(s.run.model):
        yield
