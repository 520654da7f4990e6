"""`yolo-kd compare`: did distillation help? Paired runs, what they prove, and one page that says it.

arms.py says what to run, runs.py what is left of it, training.py trains it (child.py and upstream.py inside each
training's process, progress.py tells how far it is), evaluate.py and sizes.py measure it, statistics.py judges it,
results.py puts it together, and report.py writes it down with the plots of pictures.py and the photographs of
scenes.py. flow.py is the order of all that.

Nothing is imported here, so that the process of a training starts without what only the comparison needs.
"""
