"""Linear layer and weighted cross-entropy of all streams at once."""
