"""Wheels: built here, their contents, and whether they work beside the torch versions that the package supports."""
