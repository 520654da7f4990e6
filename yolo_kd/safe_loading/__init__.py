"""Safe reading of checkpoints, model YAMLs and data YAMLs from untrusted sources."""
