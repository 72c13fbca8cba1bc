"""Sums of rows by their target row, in a fixed order."""
