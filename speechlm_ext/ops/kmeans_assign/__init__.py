"""Nearest centroid of each row, certified to be that of float64."""
