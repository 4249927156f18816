"""Methods that remove or merge tokens inside an encoder."""
