"""Sum of the streams' embeddings."""
