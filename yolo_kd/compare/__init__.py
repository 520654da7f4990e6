"""`yolo-kd compare`: did distillation help? Paired runs, what they prove, and one page that shows it.

- `pipeline.py`: the whole sequence: check, train, evaluate, summarise, report.
- `arms.py`: what to run. `runs.py`: the runs and their state files.
- `launcher.py`: starts the trainings. `worker.py` and `upstream.py` run inside each training's process.
- `progress.py`: prints how far the trainings are.
- `evaluate.py` and `size_metrics.py`: measure the checkpoints. `statistics.py`: judges the differences.
- `records.py`: the records of all results. `summary.py` and `notes.py`: create the summary.
- `report.py`, `report.html.j2` and `report.md.j2`: write the files, with `tables.py`, `plots.py` and `examples.py`.

This module imports nothing, so that the process of a training does not load what only the comparison needs.
"""
