"""cl-bench: continual learning with low-rank adapters, measured so that the numbers can be trusted."""

__version__ = "0.1.0"
