"""The report: one self-contained HTML page about a function, its two sweeps and its training."""
