"""Training on an XLA device."""
