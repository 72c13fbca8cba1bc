"""Import files of other programs, one module per kind."""
