"""Class names, and how the classes of a teacher map onto those of a student. Tensors only."""
