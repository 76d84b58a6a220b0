"""A model's way to its users: packaged as the classifier, registered, promoted by a gate, served."""
