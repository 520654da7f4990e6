"""Reading checkpoints, model YAMLs and data YAMLs that may come from a stranger."""
