"""Methods that make text-to-image diffusion cheaper."""
