"""Arithmetic that several losses share or that is written for speed."""
