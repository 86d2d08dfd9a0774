"""Grids of runs, where they run, and what they show."""
