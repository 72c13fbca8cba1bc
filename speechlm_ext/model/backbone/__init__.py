"""The causal LM of transformers underneath: built, run, compared with its own code, loaded."""
