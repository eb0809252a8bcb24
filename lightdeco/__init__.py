"""lightdeco: decorators that train a plain `torch.nn.Module` on accelerate.

>>> import torch, lightdeco as ld
>>> class Net(torch.nn.Linear):
...     @ld.training_step
...     def step(self, batch):
...         return self(batch).pow(2).mean()
...
...     @ld.configure_optimizers
...     def optimizers(self):
...         return torch.optim.SGD(self.parameters(), lr=0.1)
>>> run = ld.fit(Net(2, 1), [torch.ones(4, 2)], max_epochs=3, logger=False, progress_bar=False, summary=False)
>>> run.global_step
3
"""

import typing as _typing

from . import loggers, profilers, seeds
from .attach import (
    attach,
)
from .current import (
    backward,
    clip_gradients,
    log,
    log_artifact,
    log_dict,
    log_figure,
    log_histogram,
    log_image,
    log_table,
    log_text,
    optimizers,
    schedulers,
)
from .data import (
    CombinedLoader,
)
from .errors import (
    CheckpointError,
    DataError,
    LaunchError,
    LightdecoError,
    LightdecoWarning,
    LoggerError,
    MarkError,
    SettingsError,
    StepError,
)
from .explain import (
    eject,
    explain,
)
from .joined import (
    rank_zero_only,
)
from .loop import (
    fit,
    predict,
    test,
    validate,
)
from .marks import (
    configure_accelerator,
    configure_callbacks,
    configure_model,
    configure_optimizers,
    lr_scheduler_step,
    on,
    on_after_backward,
    on_after_batch_transfer,
    on_before_backward,
    on_before_batch_transfer,
    on_before_optimizer_step,
    on_before_zero_grad,
    on_exception,
    on_fit_end,
    on_fit_start,
    on_load_checkpoint,
    on_predict_batch_end,
    on_predict_batch_start,
    on_predict_end,
    on_predict_epoch_end,
    on_predict_epoch_start,
    on_predict_start,
    on_sanity_check_end,
    on_sanity_check_start,
    on_save_checkpoint,
    on_test_batch_end,
    on_test_batch_start,
    on_test_end,
    on_test_epoch_end,
    on_test_epoch_start,
    on_test_start,
    on_train_batch_end,
    on_train_batch_start,
    on_train_end,
    on_train_epoch_end,
    on_train_epoch_start,
    on_train_start,
    on_validation_batch_end,
    on_validation_batch_start,
    on_validation_end,
    on_validation_epoch_end,
    on_validation_epoch_start,
    on_validation_start,
    optimizer_step,
    optimizer_zero_grad,
    predict_dataloader,
    predict_step,
    prepare_data,
    setup,
    split_batch,
    teardown,
    test_dataloader,
    test_step,
    train_dataloader,
    training_step,
    transfer_batch_to_device,
    val_dataloader,
    validation_step,
)
from .mixins import (
    HparamsMixin,
    LightdecoMixin,
    LogMixin,
    OptimizerMixin,
    TrainerMixin,
)
from .optim import (
    Optim,
)
from .roles import (
    SKIP_EPOCH,
)
from .run import (
    Run,
)
from .seeds import (
    seed_everything,
)
from .settings import (
    Settings,
)

if _typing.TYPE_CHECKING:  # not under another name: checkers know it by this one
    from .callbacks import (
        DeviceStats,
        EarlyStopping,
        LambdaCallback,
        LearningRateMonitor,
        ModelCheckpoint,
        ModelSummary,
        ProgressBar,
        SpikeDetection,
        ThroughputMonitor,
        Timer,
    )
    from .checkpoint import (
        load_weights,
    )
    from .reporting import (
        compare,
    )
    from .tuning import (
        find_batch_size,
        lr_find,
    )
else:  # or a misspelt name would be no error
    from .lazy import importer as _importer

    #: Where the names are that are imported when they are first asked for.
    _LAZY = {
        "compare": ".reporting",
        "DeviceStats": ".callbacks",
        "EarlyStopping": ".callbacks",
        "LambdaCallback": ".callbacks",
        "LearningRateMonitor": ".callbacks",
        "ModelCheckpoint": ".callbacks",
        "ModelSummary": ".callbacks",
        "ProgressBar": ".callbacks",
        "SpikeDetection": ".callbacks",
        "ThroughputMonitor": ".callbacks",
        "Timer": ".callbacks",
        "find_batch_size": ".tuning",
        "load_weights": ".checkpoint",
        "lr_find": ".tuning",
    }
    __getattr__ = _importer(__name__, _LAZY)

__version__ = "0.1.0"

__all__ = [
    "SKIP_EPOCH",
    "CheckpointError",
    "CombinedLoader",
    "DataError",
    "DeviceStats",
    "EarlyStopping",
    "HparamsMixin",
    "LambdaCallback",
    "LaunchError",
    "LearningRateMonitor",
    "LightdecoError",
    "LightdecoMixin",
    "LightdecoWarning",
    "LogMixin",
    "LoggerError",
    "MarkError",
    "ModelCheckpoint",
    "ModelSummary",
    "Optim",
    "OptimizerMixin",
    "ProgressBar",
    "Run",
    "Settings",
    "SettingsError",
    "SpikeDetection",
    "StepError",
    "ThroughputMonitor",
    "Timer",
    "TrainerMixin",
    "attach",
    "backward",
    "clip_gradients",
    "compare",
    "configure_accelerator",
    "configure_callbacks",
    "configure_model",
    "configure_optimizers",
    "eject",
    "explain",
    "find_batch_size",
    "fit",
    "load_weights",
    "log",
    "log_artifact",
    "log_dict",
    "log_figure",
    "log_histogram",
    "log_image",
    "log_table",
    "log_text",
    "loggers",
    "lr_find",
    "lr_scheduler_step",
    "on",
    "on_after_backward",
    "on_after_batch_transfer",
    "on_before_backward",
    "on_before_batch_transfer",
    "on_before_optimizer_step",
    "on_before_zero_grad",
    "on_exception",
    "on_fit_end",
    "on_fit_start",
    "on_load_checkpoint",
    "on_predict_batch_end",
    "on_predict_batch_start",
    "on_predict_end",
    "on_predict_epoch_end",
    "on_predict_epoch_start",
    "on_predict_start",
    "on_sanity_check_end",
    "on_sanity_check_start",
    "on_save_checkpoint",
    "on_test_batch_end",
    "on_test_batch_start",
    "on_test_end",
    "on_test_epoch_end",
    "on_test_epoch_start",
    "on_test_start",
    "on_train_batch_end",
    "on_train_batch_start",
    "on_train_end",
    "on_train_epoch_end",
    "on_train_epoch_start",
    "on_train_start",
    "on_validation_batch_end",
    "on_validation_batch_start",
    "on_validation_end",
    "on_validation_epoch_end",
    "on_validation_epoch_start",
    "on_validation_start",
    "optimizer_step",
    "optimizer_zero_grad",
    "optimizers",
    "predict",
    "predict_dataloader",
    "predict_step",
    "prepare_data",
    "profilers",
    "rank_zero_only",
    "schedulers",
    "seed_everything",
    "seeds",
    "setup",
    "split_batch",
    "teardown",
    "test",
    "test_dataloader",
    "test_step",
    "train_dataloader",
    "training_step",
    "transfer_batch_to_device",
    "val_dataloader",
    "validate",
    "validation_step",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
