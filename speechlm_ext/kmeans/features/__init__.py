"""Where the rows of a fit come from: arrays, shards on disk, random samples of them."""
