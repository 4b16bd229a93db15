"""The parts of tools/reproduce.py: running seeds, statistics, published bases, submission."""
