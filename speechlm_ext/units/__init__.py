"""``speechlm kmeans``: units fitted to recordings, and recordings labelled with them."""
