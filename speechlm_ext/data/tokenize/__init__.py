"""``speechlm tokenize``: manifests to token folders."""
