"""Methods that shorten the visual part of a sequence."""
