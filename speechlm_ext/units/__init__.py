"""``speechlm kmeans``: fit units to recordings, and label recordings with them."""
