"""Other people's files to ours, one module a kind."""
