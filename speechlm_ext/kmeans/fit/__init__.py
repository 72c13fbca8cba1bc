"""Fitting: scan, seeding, iterations, checkpoints, shares of several processes."""
