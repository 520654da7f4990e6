"""Interruptions: whole files, signals, resume inside an epoch, and sentences for errors of disk and data."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
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
from yolo_kd.safe_loading.restricted import quiet

_IMAGE_GONE = re.compile(r"Image Not Found (.+)")
_NOTHING_TO_LEARN = ("No valid images found", "No labels found")


class _NothingToTrain(Exception):
    """All epochs of the run that is resumed are done."""


class Durability(Component):
    """Loses nothing when a training is interrupted.

    - Checkpoints are replaced whole or not at all, and `last.pt` keeps its predecessor `last.prev.pt` while it runs.
    - SIGINT and SIGTERM finish the batch, save, and print the command that continues; a second one ends at once.
    - A resumed run has every epoch once in `results.csv`, trains no batch twice, and completes what a kill at the very
      end left undone.

    It has no state in the optimiser: the position inside an epoch is an entry of the checkpoint itself.
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

    def construct(self, proceed: Callable[[], None]) -> None:
        """Name the key to change where the run's folder cannot be written to.

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
            named = {wdir, *wdir.parents, *(folder / name for name in ("args.yaml", "kd.yaml", "results.csv"))}
            if Path(error.filename) not in named:
                raise
            raise ConfigError(
                f"the run's folder {folder} cannot be written to ({error.strerror}). Name another one with project=."
            ) from error
        self._last_is_ours = bool(self.trainer.resume)

    def setup_train(self, proceed: Callable[[], None]) -> None:
        """Remove what a kill left, once it is certain that training begins."""
        proceed()
        trainer = self.trainer
        if RANK in {-1, 0}:
            run_files.clear_partials(trainer.wdir)
            if not trainer.resume:
                run_files.previous_of(trainer.last).unlink(missing_ok=True)  # of an older run in the same folder

    def resume_training(self, proceed: Callable[[dict | None], None], checkpoint: dict | None) -> None:
        """Resume also inside the first epoch and after the last one, which Ultralytics refuses."""
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
        """Restore the state of a training, which may be damaged in a file that is whole.

        Raises:
            CheckpointError: If it does not fit this training.
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
            raise CheckpointError(
                f"{trainer.args.model} cannot be resumed: its training state is damaged or of another model "
                f"({type(error).__name__}: {' '.join(str(error).split())[:120]}). Resume from another checkpoint of "
                "the run, or start a new one."
            ) from error

    def _is_complete(self, checkpoint: dict) -> bool:
        """Return whether all epochs of a run are done, or it stopped early, without being finished."""
        trainer = self.trainer
        if self._position is not None:
            return False
        best_epoch = (checkpoint.get("stopper") or {}).get("best_epoch")
        waited = 0 if best_epoch is None else checkpoint["epoch"] + 1 - best_epoch
        return checkpoint["epoch"] + 1 >= trainer.epochs or (trainer.args.val and waited >= trainer.stopper.patience)

    def _complete_files(self, checkpoint: dict) -> None:
        """Write the copies of the checkpoint that a kill right after `last.pt` has prevented."""
        trainer = self.trainer
        if self._position is not None:
            return
        fitness = (checkpoint.get("train_metrics") or {}).get("fitness")
        names = [trainer.best] if fitness is not None and fitness == checkpoint.get("best_fitness") else []
        if trainer.save_period > 0 and checkpoint["epoch"] % trainer.save_period == 0:
            names.append(trainer.wdir / f"epoch{checkpoint['epoch']}.pt")
        data = Path(trainer.args.model).read_bytes()
        for path in names:
            if not path.exists() or path.read_bytes() != data:
                run_files.write_atomically(path, data)

    # ------------------------------------------------------------------------------------------------ training

    def train(self, proceed: Callable[[], Any]) -> Any:
        """Train; SIGINT and SIGTERM stop it between two batches.

        Raises:
            Interrupted: After SIGINT, a `KeyboardInterrupt`.
            Terminated: After SIGTERM, a `SystemExit` of code 143.
            SaveError: If the disk is full or the run's folder can no longer be written to.
            DataError: If an image can no longer be read.
        """
        if RANK != -1:  # one of several ranks must not leave the others waiting, so signals end all of them at once
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
        """Save inside the epoch when the training is interrupted, and turn errors of disk and data into sentences."""
        try:
            proceed()
        except _NothingToTrain:
            self._finish()
        except (Interrupted, Terminated) as stop:
            self._save_position()
            raise self._stop() from stop
        except Exception as error:
            if self._watch.received is not None:  # loader processes got the signal as well, and died of it
                self._save_position()
                raise self._stop() from error
            if (sentence := self._sentence(error)) is None:
                raise
            if isinstance(sentence, DataError):
                self._save_position()
            raise sentence from error

    def run_callbacks(self, proceed: Callable[[str], None], event: str) -> None:
        """Count batches, and stop where a signal has asked for it, after every other callback."""
        proceed(event)
        if event == "on_train_start":
            self._watch.patient = True
            if self._only_finish:
                raise _NothingToTrain
            # not before: callbacks are handed to the processes of a multi-GPU run
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
            trainer.train_loader.reset()  # or the next epoch would begin with what this one left
            trainer.tloss = self._mean_losses()
            self._position = None

    def _mean_losses(self) -> dict[str, Any]:
        """Return the mean losses of the epoch so far, with the batches from before the run was resumed."""
        losses = self.trainer.tloss or {}
        if self._position is None:
            return losses
        return self._position.merged(losses, self.trainer.skipped, self._trained)

    def _finish(self) -> None:
        """Do what comes after the last epoch, for a run that was killed there."""
        trainer = self.trainer
        LOGGER.info(f"All {trainer.start_epoch} epochs of {trainer.args.model} are trained; finishing")
        trainer.epoch = trainer.start_epoch - 1
        trainer.final_eval()
        if RANK in {-1, 0}:
            if trainer.args.plots:
                trainer.plot_metrics()
            trainer.run_callbacks("on_train_end")
        for loader in (trainer.train_loader, trainer.test_loader):
            loader.close()

    def _sentence(self, error: Exception) -> YoloKDError | None:
        """Return the sentence for an error of disk or data, None for an error of the program."""
        trainer = self.trainer
        text = str(error)
        command = run_files.resume_command(trainer.last, trainer.alone)
        if isinstance(error, FileNotFoundError) and (found := _IMAGE_GONE.search(text)):
            again = f"go on with: {command}" if trainer.last.exists() or self._unsaved else "start the run again."
            return DataError(
                f"image {found[1]} cannot be read any more: it was removed or damaged while training. "
                f"Put it back, or delete it to train without it, and {again}"
            )
        if any(text.startswith(start) or f": {start}" in text for start in _NOTHING_TO_LEARN):
            return DataError(f"data={trainer.args.data} cannot be trained on: {' '.join(text.split())}")
        return run_files.unwritable(error, trainer.last, trainer.alone) if isinstance(error, OSError) else None

    def _stop(self) -> BaseException:
        """Return what to raise for the signal that arrived, with the command that continues."""
        trainer = self.trainer
        place = ""
        if self._trained:
            done, batches = trainer.skipped + self._trained, len(trainer.train_loader)
            place = f" in epoch {trainer.epoch + 1} of {trainer.epochs}, after {done} of {batches} batches"
        command = run_files.resume_command(trainer.last, trainer.alone)
        exists = trainer.last.exists()
        then = f"Go on with: {command}" if exists else "There is no checkpoint yet: start the run again."
        return self._watch.stop(f"Stopped by {self._watch.name}{place}. {then}")

    # ------------------------------------------------------------------------------------------------ files

    def save_model(self, proceed: Callable[[], bool]) -> bool:
        """Save as Ultralytics does, each file whole or not at all."""
        trainer = self.trainer
        if trainer.best_fitness is not None and not trainer.best.exists():
            trainer.best_fitness = trainer.fitness  # the best of those that are left
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
        """Write a `last.pt` that continues inside the current epoch, unless the last one is as new.

        It counts as the checkpoint of the epoch before, whose row is the last in `results.csv`.
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
                data = run_files.with_entry(data, POSITION, position.to_dict())
            self._write(trainer.last, data)
        except OSError as error:
            raise run_files.unwritable(error, trainer.last, trainer.alone) or error from error
        finally:
            trainer.epoch += 1
        self._unsaved = 0

    def save_metrics(self, proceed: Callable[[dict], None], metrics: dict) -> None:
        """Append to `results.csv`, whose time continues where the run was resumed."""
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

        with ExitStack() as stack:
            stack.enter_context(patches.replaced(torch_utils, "torch_load", load_to_strip))
            stack.enter_context(run_files.stripping_atomically(trainer.last, trainer.provenance(), quiet))
            proceed()
