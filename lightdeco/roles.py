"""The one table of the vocabulary: every role and event, the arguments it offers, and who may carry it.

Decorators, discovery, error messages, the loop and the documentation all read this table; nothing else knows a role.
"""

from dataclasses import dataclass
from enum import Enum
from typing import Final, Literal

Kind = Literal["step", "configure", "override", "data", "event"]
Owner = Literal["model", "data", "callback"]


class _Skip(Enum):
    EPOCH = "SKIP_EPOCH"


#: Returned by an `on_train_batch_start` event, it ends the epoch before that batch.
SKIP_EPOCH: Final = _Skip.EPOCH

#: What every role and event may ask for, besides what the table lists for it.
ALWAYS: Final = ("run", "model")


@dataclass(frozen=True)
class Role:
    """One line of the table.

    `offers` are the arguments in the order in which the loop passes them; `shared` roles may be carried by several
    objects (each at most once), events by any number of methods, all others by one method of a run.
    """

    name: str
    kind: Kind
    offers: tuple[str, ...]
    owners: tuple[Owner, ...]
    when: str
    shared: bool = False


_MODEL: Final[tuple[Owner, ...]] = ("model",)
_DATA: Final[tuple[Owner, ...]] = ("model", "data")
_ALL: Final[tuple[Owner, ...]] = ("model", "data", "callback")
_STEP: Final = ("batch", "batch_idx", "dataloader_idx")
_TRANSFER: Final = ("batch", "device", "dataloader_idx")


def _steps() -> list[Role]:
    return [
        Role("training_step", "step", (*_STEP, "carry"), _MODEL, "once per training batch; returns the loss"),
        Role("validation_step", "step", _STEP, _MODEL, "once per validation batch"),
        Role("test_step", "step", _STEP, _MODEL, "once per test batch"),
        Role("predict_step", "step", _STEP, _MODEL, "once per batch of `predict`; returns what is yielded"),
    ]


def _configuration() -> list[Role]:
    return [
        Role("configure_optimizers", "configure", (), _MODEL, "once, when the model is on its device"),
        Role("configure_model", "configure", (), _MODEL, "once, before the model is moved to its device"),
        Role("configure_callbacks", "configure", (), _MODEL, "once, first of all; returns callbacks"),
        Role("configure_accelerator", "configure", (), _MODEL, "once; returns arguments for accelerate.Accelerator"),
    ]


def _overrides() -> list[Role]:
    return [
        Role("backward", "override", ("loss", "optimizer"), _MODEL, "instead of `loss.backward()`"),
        Role("optimizer_step", "override", ("optimizer", "closure"), _MODEL, "instead of `optimizer.step()`"),
        Role("optimizer_zero_grad", "override", ("optimizer",), _MODEL, "instead of `optimizer.zero_grad()`"),
        Role("clip_gradients", "override", ("optimizer",), _MODEL, "instead of the clipping that the settings ask for"),
        Role("lr_scheduler_step", "override", ("scheduler", "metric"), _MODEL, "instead of `scheduler.step()`"),
        Role("split_batch", "override", ("batch", "size"), _MODEL, "to cut a batch for truncated backpropagation"),
        Role("transfer_batch_to_device", "override", _TRANSFER, _DATA, "instead of moving every tensor of the batch"),
    ]


def _data() -> list[Role]:
    return [
        Role("prepare_data", "data", (), _DATA, "once per node, before any other process reads", shared=True),
        Role("setup", "data", ("stage",), _ALL, "on every process, before the loaders are made", shared=True),
        Role("teardown", "data", ("stage",), _ALL, "on every process, at the end of the verb", shared=True),
        Role("train_dataloader", "data", (), _DATA, "when `fit` starts"),
        Role("val_dataloader", "data", (), _DATA, "when `fit` or `validate` starts"),
        Role("test_dataloader", "data", (), _DATA, "when `test` starts"),
        Role("predict_dataloader", "data", (), _DATA, "when `predict` starts"),
    ]


def _event(name: str, when: str, *offers: str) -> Role:
    return Role(name, "event", offers, _ALL, when)


def _events() -> list[Role]:
    rows = [
        _event("on_fit_start", "everything is set up, before the sanity check"),
        _event("on_fit_end", "the last event of a `fit` that did not fail"),
        _event("on_sanity_check_start", "before the sanity check of validation"),
        _event("on_sanity_check_end", "after the sanity check of validation"),
    ]
    for stage in ("train", "validation", "test", "predict"):
        where = "an epoch" if stage == "train" else "the loaders"
        rows += [
            _event(f"on_{stage}_start", f"before the first {stage} epoch"),
            _event(f"on_{stage}_end", f"after the last {stage} epoch, its record written"),
            _event(f"on_{stage}_epoch_start", f"before the first batch of {where}"),
            _event(f"on_{stage}_epoch_end", f"after the last batch of {where}; what it logs joins the record"),
            _event(f"on_{stage}_batch_start", "the batch is on the device", *_STEP),
            _event(f"on_{stage}_batch_end", "the batch is done and counted", *_STEP, "outputs"),
        ]
    return [
        *rows,
        _event("on_before_zero_grad", "before gradients are cleared, at the start of a window", "optimizer"),
        _event("on_before_backward", "after the training step, before backward", "loss", "optimizer"),
        _event("on_after_backward", "after backward of each batch, before clipping", "optimizer"),
        _event("on_before_optimizer_step", "gradients are complete and not yet clipped", "optimizer"),
        _event("on_before_batch_transfer", "before a batch is moved; may return a changed batch", *_TRANSFER),
        _event("on_after_batch_transfer", "after a batch was moved; may return a changed batch", *_TRANSFER),
        _event("on_save_checkpoint", "while a checkpoint is made; fill `state`", "state"),
        _event("on_load_checkpoint", "while a checkpoint is restored; read `state`", "state"),
        _event("on_exception", "the run ends with an exception, which is raised afterwards", "exception"),
    ]


#: Every role and event by name, in the order of the documentation.
ROLES: Final[dict[str, Role]] = {
    role.name: role for role in (*_steps(), *_configuration(), *_overrides(), *_data(), *_events())
}

#: The steps that belong to a stage of the data, and the role that brings the loaders of that stage.
STAGE_STEP: Final = {"train": "training_step", "val": "validation_step", "test": "test_step", "predict": "predict_step"}
STAGE_LOADER: Final = {stage: f"{stage}_dataloader" for stage in STAGE_STEP}

#: The way of a batch to the device: an event, the override, an event.
TRANSFER: Final = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")

#: The events at the end of a batch.
BATCH_ENDS: Final = tuple(f"on_{stage}_batch_end" for stage in ("train", "validation", "test", "predict"))

#: What each verb cannot do without, and the stage of the data that it is named after.
REQUIRED: Final[dict[str, tuple[str, ...]]] = {
    "fit": ("training_step", "configure_optimizers"),
    "validate": ("validation_step",),
    "test": ("test_step",),
    "predict": ("predict_step",),
}
VERB_STAGE: Final = {"fit": "train", "validate": "val", "test": "test", "predict": "predict"}
