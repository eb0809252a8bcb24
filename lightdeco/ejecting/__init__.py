"""`ld.eject` in parts: what is known of a run, the texts of a script, and `eject.script`, which puts them together."""
