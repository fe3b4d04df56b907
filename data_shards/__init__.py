"""Image–mask–text triplets in WebDataset shards: what a model learns from."""
