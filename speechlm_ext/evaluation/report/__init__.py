"""HTML pages with tables, plots and audio players."""
