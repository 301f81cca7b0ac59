"""Proof that a layout trains what one process would."""
