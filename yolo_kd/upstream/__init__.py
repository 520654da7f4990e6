"""Everything that knows how Ultralytics looks inside: heads, hooks, the task loss, run folders, precision and DDP.

Nothing here is tied to a model family: layers, widths and strides are read from the model.
"""
