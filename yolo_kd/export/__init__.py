"""Export of a student, and comparison of the exported file with the checkpoint."""
