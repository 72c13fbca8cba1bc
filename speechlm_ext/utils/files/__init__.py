"""Files: atomic writes, folders, strict readers of JSON and YAML, checkpoint folders."""
