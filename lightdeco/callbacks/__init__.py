"""Callbacks: objects with marked methods, as a user would write them. Each is imported when it is first asked for."""

from typing import TYPE_CHECKING as _TYPE_CHECKING

if _TYPE_CHECKING:
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

_MODULES = {
    "DeviceStats": "device_stats",
    "EarlyStopping": "early_stopping",
    "LambdaCallback": "lambda_callback",
    "LearningRateMonitor": "learning_rate_monitor",
    "ModelCheckpoint": "model_checkpoint",
    "ModelSummary": "model_summary",
    "ProgressBar": "progress_bar",
    "SpikeDetection": "spike_detection",
    "ThroughputMonitor": "throughput_monitor",
    "Timer": "timer",
}

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


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module 'lightdeco.callbacks' has no attribute {name!r}")
    import importlib

    found = globals()[name] = getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    return found
