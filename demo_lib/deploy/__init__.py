"""A model's way to its users.

A network that a run has logged goes through the rooms in this order: `packaging` wraps it in the `classifier`, which
MLflow copies into the model; `registry` makes the package a version and lets it pass the gate to the alias `champion`;
`serving` answers requests with whatever has that alias.
"""
