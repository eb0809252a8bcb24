"""Callbacks: objects with marked methods, as a user would write them."""

from .model_summary import ModelSummary
from .progress_bar import ProgressBar

__all__ = ["ModelSummary", "ProgressBar"]
