"""Unlabeled images: finding them, drawing them, and the labels that a teacher gives them."""
