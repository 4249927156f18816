"""Methods that leave tokens, heads and cache entries of text models out of attention."""
