"""Delay-interleaved packing and its inverse."""
