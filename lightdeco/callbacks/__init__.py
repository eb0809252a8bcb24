"""Callbacks: objects with marked methods, as a user would write them. Each is imported when it is first asked for."""

import typing as _typing

if _typing.TYPE_CHECKING:  # not under another name: checkers know it by this one
    from .device_stats import DeviceStats
    from .early_stopping import EarlyStopping
    from .lambda_callback import LambdaCallback
    from .learning_rate_monitor import LearningRateMonitor
    from .model_checkpoint import ModelCheckpoint
    from .model_summary import ModelSummary
    from .progress_bar import ProgressBar
    from .spike_detection import SpikeDetection
    from .throughput_monitor import ThroughputMonitor
    from .timer import Timer
else:  # or a misspelt name would be no error
    from lightdeco.lazy import importer as _importer

    _MODULES = {
        "DeviceStats": ".device_stats",
        "EarlyStopping": ".early_stopping",
        "LambdaCallback": ".lambda_callback",
        "LearningRateMonitor": ".learning_rate_monitor",
        "ModelCheckpoint": ".model_checkpoint",
        "ModelSummary": ".model_summary",
        "ProgressBar": ".progress_bar",
        "SpikeDetection": ".spike_detection",
        "ThroughputMonitor": ".throughput_monitor",
        "Timer": ".timer",
    }
    __getattr__ = _importer(__name__, _MODULES)

__all__ = [
    "DeviceStats",
    "EarlyStopping",
    "LambdaCallback",
    "LearningRateMonitor",
    "ModelCheckpoint",
    "ModelSummary",
    "ProgressBar",
    "SpikeDetection",
    "ThroughputMonitor",
    "Timer",
]
