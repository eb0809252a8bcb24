"""Callbacks: objects with marked methods, as a user would write them."""

from .device_stats import DeviceStats
from .early_stopping import EarlyStopping
from .lambda_callback import LambdaCallback
from .learning_rate_monitor import LearningRateMonitor
from .model_checkpoint import ModelCheckpoint
from .model_summary import ModelSummary
from .progress_bar import ProgressBar
from .throughput_monitor import ThroughputMonitor
from .timer import Timer

__all__ = [
    "DeviceStats",
    "EarlyStopping",
    "LambdaCallback",
    "LearningRateMonitor",
    "ModelCheckpoint",
    "ModelSummary",
    "ProgressBar",
    "ThroughputMonitor",
    "Timer",
]
