"""Parts of tools/report.py: what is known of a run, its pictures, the page."""
