"""The checks of `tools/audit.py`, one module a group."""
