"""Methods that remove weights."""
