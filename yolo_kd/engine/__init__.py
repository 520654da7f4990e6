"""Training: the trainer, its components, the plan of a run, its files, resume and signals."""
