"""What several ops share: the native module, memory, matrix products of one result for any number of threads."""
