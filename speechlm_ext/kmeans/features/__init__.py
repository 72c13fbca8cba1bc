"""The rows of a fit: arrays, shards on disk, random samples of them."""
