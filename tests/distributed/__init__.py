"""Several processes: starting, watching, ending."""
