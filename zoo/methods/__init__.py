"""One file per method, grouped by family; found by file name."""
