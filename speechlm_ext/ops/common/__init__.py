"""Shared by several ops: the native module, memory, matrix products, torch's dispatcher."""
