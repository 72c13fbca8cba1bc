"""The files of a model folder: configuration and digests checked, weights checked before they are read."""
