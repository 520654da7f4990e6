"""Everything that depends on how Ultralytics works inside: heads, hooks, the task loss, run folders, bfloat16 and DDP.

Nothing here is tied to a model family: layers, widths and strides are read from the model.
"""
