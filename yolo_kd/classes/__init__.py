"""Class names, and the mapping of teacher classes onto student classes. These modules use tensors only."""
