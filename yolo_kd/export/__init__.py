"""Exporting a student, and comparing the exported file with the checkpoint."""
