"""Files: atomic writes, folders, JSON and YAML read strictly, checkpoint folders."""
