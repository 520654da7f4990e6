"""Arithmetic that losses share or that is written for speed."""
