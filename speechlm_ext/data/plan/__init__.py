"""The pack plan: the samples of each pack, computed from lengths before any token is read; and its report."""
