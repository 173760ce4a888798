"""Strong-lens simulation, training, search and evaluation at scale, on Ray."""

__version__ = "0.1.0"
