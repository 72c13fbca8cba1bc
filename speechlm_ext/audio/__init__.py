"""Sound files: reading, converting, writing, and writing piece by piece."""
