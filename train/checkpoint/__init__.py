"""Checkpoints: a run's state by logical name, in files that are checked, and from which any layout goes on."""
