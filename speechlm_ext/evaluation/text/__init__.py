"""Word error rate: normalization of words and numbers, and alignment."""
