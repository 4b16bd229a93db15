"""Parts of tools/sweep.py."""
