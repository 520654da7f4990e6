"""Interruptions of a training: whole files, signals, resume inside an epoch, and messages for disk and data errors."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from ultralytics.engine import trainer as engine
from ultralytics.utils import LOGGER, RANK, torch_utils

from yolo_kd import patches
from yolo_kd.engine import results_csv, run_files
from yolo_kd.engine.component import Component
from yolo_kd.engine.epoch_position import POSITION, EpochPosition, RestOfEpoch
from yolo_kd.engine.signals import Interrupted, SignalWatch, Terminated, terminate_children
from yolo_kd.errors import CheckpointError, ConfigError, DataError, YoloKDError

_IMAGE_GONE = re.compile(r"Image Not Found (.+)")
_NOTHING_TO_LEARN = ("No valid images found", "No labels found")


class _NothingToTrain(Exception):
    """All epochs of the resumed run are trained."""


class Durability(Component):
    """Loses nothing when a training is interrupted.

    - Checkpoints are replaced whole or not at all. During the training, `last.prev.pt` is the predecessor of `last.pt`.
    - On SIGINT or SIGTERM, the batch is finished, a checkpoint is saved, and the command that resumes is printed. A
      second signal ends the process at once.
    - In a resumed run, `results.csv` contains each epoch once, no batch is trained twice, and the work after the last
      epoch is completed.

    The component has no state in the optimiser: the position inside an epoch is an entry of the checkpoint.
    """

    def __init__(self, trainer: Any):
        super().__init__(trainer)
        self._watch = SignalWatch()
        self._position: EpochPosition | None = None  # of the resumed checkpoint, until its epoch is over
        self._trained = 0  # batches of the current epoch in this process
        self._unsaved = 0  # batches since the last checkpoint
        self._time_before = 0.0  # training time of the run before it was resumed, in seconds
        self._only_finish = False
        self._last_is_ours = False

    # ------------------------------------------------------------------------------------------------ set-up

    def init(self, proceed: Callable[[], None]) -> None:
        """Name the key to change if the run's folder cannot be written to.

        Raises:
            ConfigError: If the folder cannot be written to.
        """
        try:
            proceed()
        except OSError as error:
            wdir: Path | None = getattr(self.trainer, "wdir", None)
            if wdir is None or not error.filename:
                raise
            folder = wdir.parent
            if Path(error.filename) in {
                wdir,
                *wdir.parents,
                *(folder / f for f in ("args.yaml", "kd.yaml", "results.csv")),
            }:
                message = f"the run's folder {folder} cannot be written to ({error.strerror}). Choose another project=."
                raise ConfigError(message) from error
            raise
        self._last_is_ours = bool(self.trainer.resume)

    def setup_train(self, proceed: Callable[[], None]) -> None:
        """Remove the files of a killed process, once it is certain that the training begins."""
        proceed()
        trainer = self.trainer
        if RANK in {-1, 0}:
            run_files.clear_partials(trainer.wdir)
            if not trainer.resume:
                run_files.previous_of(trainer.last).unlink(missing_ok=True)  # of an older run in the same folder

    def resume_training(self, proceed: Callable[[dict | None], None], checkpoint: dict | None) -> None:
        """Resume also inside the first epoch and after the last one, where Ultralytics does not."""
        trainer = self.trainer
        if checkpoint is None or not trainer.resume:
            return proceed(checkpoint)
        finished = checkpoint["epoch"] + 1
        self._position = EpochPosition.of_checkpoint(checkpoint)
        if self._is_complete(checkpoint):
            self._only_finish = True
            trainer.restore(checkpoint)
            trainer.start_epoch = finished
        elif finished == 0:
            LOGGER.info(f"Resuming training {trainer.args.model} inside its first epoch")
            trainer.restore(checkpoint)
        else:
            proceed(checkpoint)
        if RANK in {-1, 0}:
            self._time_before = results_csv.cut(trainer.csv, finished, checkpoint.get("train_results"))
            self._complete_files(checkpoint)
        return None

    def load_checkpoint_state(self, proceed: Callable[[dict], None], checkpoint: dict) -> None:
        """Restore the state of a training, which may be invalid even in a whole file.

        Raises:
            CheckpointError: If the state does not fit this training.
        """
        trainer = self.trainer
        try:
            proceed(checkpoint)
            for p, state in trainer.optimizer.state.items():
                for name, value in state.items():
                    if isinstance(value, torch.Tensor) and value.ndim and value.shape != p.shape:
                        raise ValueError(f"{name} of shape {[*value.shape]} for a weight of shape {[*p.shape]}")
        except torch.OutOfMemoryError:
            raise
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
            raise CheckpointError(
                f"{trainer.args.model} cannot be resumed: its training state is damaged or of another model "
                f"({reason}). Resume from another checkpoint of the run, or start a new one."
            ) from error

    def _is_complete(self, checkpoint: dict) -> bool:
        """Return whether a run was killed after its last epoch, or after stopping early."""
        trainer = self.trainer
        if self._position is not None:
            return False
        best_epoch = (checkpoint.get("stopper") or {}).get("best_epoch")
        waited = 0 if best_epoch is None else checkpoint["epoch"] + 1 - best_epoch
        return checkpoint["epoch"] + 1 >= trainer.epochs or (trainer.args.val and waited >= trainer.stopper.patience)

    def _complete_files(self, checkpoint: dict) -> None:
        """Write the copies of the checkpoint that are missing after a kill right after `last.pt` was written."""
        trainer = self.trainer
        if self._position is not None:
            return
        fitness = (checkpoint.get("train_metrics") or {}).get("fitness")
        names = [trainer.best] if fitness is not None and fitness == checkpoint.get("best_fitness") else []
        if trainer.save_period > 0 and checkpoint["epoch"] % trainer.save_period == 0:
            names.append(trainer.wdir / f"epoch{checkpoint['epoch']}.pt")
        for path in names:
            run_files.write_atomically(path, Path(trainer.args.model).read_bytes())

    # ------------------------------------------------------------------------------------------------ training

    def train(self, proceed: Callable[[], Any]) -> Any:
        """Train; SIGINT and SIGTERM stop it between two batches.

        Raises:
            Interrupted: After SIGINT, a `KeyboardInterrupt`.
            Terminated: After SIGTERM, a `SystemExit` of code 143.
            SaveError: If the disk is full or the run's folder can no longer be written to.
            DataError: If an image can no longer be read.
        """
        if RANK != -1:  # signals end all ranks at once, so that none waits for another
            return proceed()
        with SignalWatch(terminate_children if self.trainer.ddp else None) as self._watch:
            try:
                return proceed()
            except subprocess.CalledProcessError as error:  # the launcher of the ranks
                if self._watch.received is None:
                    raise
                stop = self._stop()
                LOGGER.warning(str(stop))
                raise stop from error
            except (Interrupted, Terminated) as stop:
                LOGGER.warning(str(stop))
                raise

    def do_train(self, proceed: Callable[[], None]) -> None:
        """Save inside the epoch on an interruption, and raise errors with sentences for disk and data errors."""
        try:
            proceed()
        except _NothingToTrain:
            self._finish()
        except (Interrupted, Terminated) as stop:
            self._save_position()
            raise self._stop() from stop
        except Exception as error:
            if self._watch.received is not None:  # the signal also ended the loader processes
                self._save_position()
                raise self._stop() from error
            if (sentence := self._sentence(error)) is None:
                raise
            if isinstance(sentence, DataError):
                self._save_position()
            raise sentence from error

    def run_callbacks(self, proceed: Callable[[str], None], event: str) -> None:
        """Count batches, and stop after a signal, when all other callbacks have run."""
        proceed(event)
        if event == "on_train_start":
            self._watch.patient = True
            if self._only_finish:
                raise _NothingToTrain
            # not earlier: callbacks are passed to the processes of a multi-GPU run
            self.trainer.add_callback("on_val_batch_end", lambda _: self._stop_if_asked())
        elif event == "on_train_epoch_start":
            self._begin_epoch()
            self._stop_if_asked()
        elif event == "on_train_batch_end":
            self._trained += 1
            self._unsaved += 1
            self._stop_if_asked()
        elif event == "on_train_epoch_end":
            self._end_epoch()

    def _stop_if_asked(self) -> None:
        if self._watch.received is not None:
            raise self._watch.stop("")

    def _begin_epoch(self) -> None:
        trainer = self.trainer
        self._trained = trainer.skipped = 0
        if self._position is not None and trainer.epoch == trainer.start_epoch:
            batches = len(trainer.train_loader)
            trainer.skipped = self._position.done(batches)
            trainer.train_loader = RestOfEpoch(trainer.train_loader, batches - trainer.skipped)

    def _end_epoch(self) -> None:
        trainer = self.trainer
        if isinstance(trainer.train_loader, RestOfEpoch):
            trainer.train_loader = trainer.train_loader.loader
            trainer.train_loader.reset()  # or the next epoch would begin with the prefetched batches of this one
            trainer.tloss = self._mean_losses()
            self._position = None

    def _mean_losses(self) -> dict[str, Any]:
        """Return the mean losses of the epoch so far, including the batches before the interruption."""
        losses = self.trainer.tloss or {}
        if self._position is None:
            return losses
        return self._position.merged(losses, self.trainer.skipped, self._trained)

    def _finish(self) -> None:
        """Do the work after the last epoch, for a run that was killed there."""
        trainer = self.trainer
        LOGGER.info(f"All {trainer.start_epoch} epochs of {trainer.args.model} are trained; finishing the run")
        trainer.epoch = trainer.start_epoch - 1
        trainer.final_eval()
        if RANK in {-1, 0}:
            if trainer.args.plots:
                trainer.plot_metrics()
            trainer.run_callbacks("on_train_end")
        for loader in (trainer.train_loader, trainer.test_loader):
            loader.close()

    def _sentence(self, error: Exception) -> YoloKDError | None:
        """Return the error with a sentence for a disk or data error, None for an error of the program."""
        trainer = self.trainer
        text = str(error)
        command = run_files.resume_command(trainer.last, trainer.alone)
        if isinstance(error, FileNotFoundError) and (found := _IMAGE_GONE.search(text)):
            again = f"continue with: {command}" if trainer.last.exists() or self._unsaved else "start the run again."
            return DataError(
                f"image {found[1]} can no longer be read: it was removed or damaged during the training. "
                f"Restore it, or delete it to train without it, and {again}"
            )
        if any(text.startswith(start) or f": {start}" in text for start in _NOTHING_TO_LEARN):
            return DataError(f"data={trainer.args.data} cannot be trained on: {' '.join(text.split())}")
        return run_files.unwritable(error, trainer.last, trainer.alone) if isinstance(error, OSError) else None

    def _stop(self) -> BaseException:
        """Return the exception for the signal that arrived, with the command that resumes."""
        trainer = self.trainer
        place = ""
        if self._trained:
            done, batches = trainer.skipped + self._trained, len(trainer.train_loader)
            place = f" in epoch {trainer.epoch + 1} of {trainer.epochs}, after {done} of {batches} batches"
        command = run_files.resume_command(trainer.last, trainer.alone)
        then = f"Continue with: {command}"
        if not trainer.last.exists():
            then = "There is no checkpoint yet: start the run again."
        return self._watch.stop(f"Stopped by {self._watch.name}{place}. {then}")

    # ------------------------------------------------------------------------------------------------ files

    def save_model(self, proceed: Callable[[], bool]) -> bool:
        """Save as Ultralytics does, each file whole or not at all."""
        trainer = self.trainer
        if trainer.best_fitness is not None and not trainer.best.exists():
            trainer.best_fitness = trainer.fitness  # the best of the remaining checkpoints
        with run_files.recorded(trainer) as files:
            saved = proceed()
        for name, data in files.items():
            self._write(trainer.wdir / name, data)
        self._unsaved = 0
        return saved

    def _write(self, path: Path, data: bytes) -> None:
        last = path == self.trainer.last
        keep = run_files.previous_of(path) if last and self._last_is_ours else None
        run_files.write_atomically(path, data, keep=keep)
        self._last_is_ours |= last

    def _save_position(self) -> None:
        """Write a `last.pt` that resumes inside the current epoch, unless the last one is up to date.

        It is a checkpoint of the previous epoch, whose row is the last in `results.csv`.
        """
        trainer = self.trainer
        if RANK not in {-1, 0} or not self._unsaved or trainer.loss is None or not bool(trainer.loss.isfinite()):
            return
        done = trainer.skipped + self._trained
        trainer.epoch -= 1
        try:
            with run_files.recorded(trainer) as files:
                engine.BaseTrainer.save_model(trainer)
            data = files[trainer.last.name]
            if done:
                losses = {name: float(value) for name, value in self._mean_losses().items()}
                position = EpochPosition(done, len(trainer.train_loader), losses)
                data = run_files.with_entry(data, POSITION, asdict(position))
            self._write(trainer.last, data)
        except OSError as error:
            raise run_files.unwritable(error, trainer.last, trainer.alone) or error from error
        finally:
            trainer.epoch += 1
        self._unsaved = 0

    def save_metrics(self, proceed: Callable[[dict], None], metrics: dict) -> None:
        """Append to `results.csv`, whose time includes that before the run was resumed."""
        self.trainer.train_time_start -= self._time_before
        try:
            proceed(metrics)
        finally:
            self.trainer.train_time_start += self._time_before

    def final_eval(self, proceed: Callable[[], None]) -> None:
        """Strip and evaluate the finished checkpoints as Ultralytics does, each replaced whole."""
        trainer = self.trainer
        load = torch_utils.torch_load

        def load_to_strip(*args: Any, **keys: Any) -> Any:
            checkpoint = load(*args, **keys)
            trainer.finish_checkpoint(checkpoint)
            return checkpoint

        stripping = run_files.stripping_atomically(trainer.last, trainer.provenance())
        with patches.replaced(torch_utils, "torch_load", load_to_strip), stripping:
            proceed()
