"""Running things: what the commands do besides training."""
