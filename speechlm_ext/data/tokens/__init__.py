"""Token folders: Parquet shards, their index, and their reader."""
