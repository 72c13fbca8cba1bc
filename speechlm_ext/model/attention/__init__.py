"""Attention over packed rows and over a key/value cache, and the choice of its kernel."""
