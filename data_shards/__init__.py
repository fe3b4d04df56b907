"""Image–mask–text triplets in WebDataset shards: what a model learns from."""

__version__ = "0.1.0"
"""Version of the distribution `sam-trainer`, of which this package and `trainer` are the halves."""
