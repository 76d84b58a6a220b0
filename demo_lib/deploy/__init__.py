"""A model's way to its users.

`packaging` logs the model that others use: the `classifier` around a network. `registry` gives it a name and versions,
and its gate decides which version is the champion. `serving` runs MLflow's scoring server on it.
"""
