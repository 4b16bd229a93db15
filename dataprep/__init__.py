"""The parts of `prepare_caseops_data.py`: files, reading, tokenising, leak guard, checks, download, demo."""
