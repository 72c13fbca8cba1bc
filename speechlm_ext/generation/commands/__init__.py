"""The command ``speechlm generate``."""
