"""Developers benchmarks: speed as ratios in one run. Not in the wheel."""
