"""`DurableTrainer`: Ultralytics' detection trainer that loses nothing when it is interrupted. It knows no teacher."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from ultralytics.engine import trainer as engine
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.utils import DEFAULT_CFG, LOGGER, RANK, torch_utils

from yolo_kd.engine import results_csv as history
from yolo_kd.engine import run_files as saving
from yolo_kd.engine.epoch_position import POSITION, Position, RestOfEpoch
from yolo_kd.engine.signals import Interrupted, SignalWatch, Terminated, terminate_children
from yolo_kd.errors import CheckpointError, ConfigError, DataError, YoloKDError
from yolo_kd.safe_loading.restricted import quiet


class DurableTrainer(DetectionTrainer):
    """Trains as Ultralytics does, and adds what a run of days needs.

    - Checkpoints are replaced whole or not at all, and `last.pt` keeps its predecessor `last.prev.pt` while it runs.
    - SIGINT and SIGTERM finish the batch, save, and say how to go on; a second one ends at once.
    - A resumed run has every epoch once in `results.csv`, trains no batch twice, and finishes what a kill at the very
      end has left over.
    """

    train_loader: Any
    best_fitness: float | None

    def __init__(self, cfg: Any = DEFAULT_CFG, overrides: dict | None = None, _callbacks: dict | None = None):
        self._watch = SignalWatch()
        self._keepsake = history.Keepsake()
        self._position: Position | None = None  # of the checkpoint that is resumed, until its epoch is over
        self._skipped = 0  # batches of the current epoch that were done before the run was resumed
        self._seen = 0  # and since then
        self._unsaved = 0  # batches since the last checkpoint
        self._time_before = 0.0  # training time of the run before it was resumed, in seconds
        self._only_finish = False
        self._last_is_ours = False
        try:
            super().__init__(cfg, overrides, _callbacks)
        except OSError as error:
            raise self._no_folder(error) or error from error
        self._last_is_ours = bool(self.resume)

    def _no_folder(self, error: OSError) -> ConfigError | None:
        wdir: Path | None = getattr(self, "wdir", None)
        if wdir is None or not error.filename or Path(error.filename) not in {wdir, *wdir.parents, *_small_files(self)}:
            return None
        return ConfigError(
            f"the run's folder {wdir.parent} cannot be written to ({error.strerror}). Name another one with project=."
        )

    @property
    def alone(self) -> bool:
        """Whether the run has no teacher, which the command that resumes it must say."""
        return True

    # ---------------------------------------------------------------------------------------------- set-up

    def _setup_train(self) -> None:
        """Clear away what a kill has left, once it is certain that training begins."""
        super()._setup_train()
        if RANK not in {-1, 0}:
            return
        saving.clear_partials(self.wdir)
        if not self.resume:
            saving.previous_of(self.last).unlink(missing_ok=True)  # of an older run in the same folder

    def resume_training(self, ckpt: dict | None) -> None:
        """Resume also inside the first epoch and after the last one, which Ultralytics refuses."""
        if ckpt is None or not self.resume:
            return super().resume_training(ckpt)
        finished = ckpt["epoch"] + 1
        self._position = Position.of_checkpoint(ckpt)
        if self._is_complete(ckpt):
            self._only_finish = True
            self._load_checkpoint_state(ckpt)
            self.start_epoch = finished
        elif finished == 0:
            LOGGER.info(f"Resuming training {self.args.model} inside its first epoch")
            self._load_checkpoint_state(ckpt)
        else:
            super().resume_training(ckpt)
        if RANK in {-1, 0}:
            self._time_before = history.cut(self.csv, finished, ckpt.get("train_results"))
            self._complete_files(ckpt)
        return None

    def _load_checkpoint_state(self, ckpt: dict) -> None:
        """Restore the state of a training, which may be damaged in a file that is whole.

        Raises:
            CheckpointError: If it does not fit this training.
        """
        try:
            super()._load_checkpoint_state(ckpt)
            for p, state in self.optimizer.state.items():
                for name, value in state.items():
                    if isinstance(value, torch.Tensor) and value.ndim and value.shape != p.shape:
                        raise ValueError(f"{name} of shape {[*value.shape]} for a weight of shape {[*p.shape]}")
        except torch.OutOfMemoryError:
            raise
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{self.args.model} cannot be resumed: its training state is damaged or of another model "
                f"({type(error).__name__}: {' '.join(str(error).split())[:120]}). Resume from another checkpoint of "
                "the run, or start a new one."
            ) from error

    def _is_complete(self, ckpt: dict) -> bool:
        """Return whether a run ended before it was finished: all its epochs are done, or it stopped early."""
        if self._position is not None:
            return False
        best_epoch = (ckpt.get("stopper") or {}).get("best_epoch")
        waited = 0 if best_epoch is None else ckpt["epoch"] + 1 - best_epoch
        return ckpt["epoch"] + 1 >= self.epochs or (self.args.val and waited >= self.stopper.patience)

    def _complete_files(self, ckpt: dict) -> None:
        """Write the copies of the checkpoint that a kill right after `last.pt` has prevented."""
        if self._position is not None:
            return
        fitness = (ckpt.get("train_metrics") or {}).get("fitness")
        names = [self.best] if fitness is not None and fitness == ckpt.get("best_fitness") else []
        if self.save_period > 0 and ckpt["epoch"] % self.save_period == 0:
            names.append(self.wdir / f"epoch{ckpt['epoch']}.pt")
        data = Path(self.args.model).read_bytes()
        for path in names:
            if not path.exists() or path.read_bytes() != data:
                saving.write_atomically(path, data)

    # ---------------------------------------------------------------------------------------------- training

    def train(self) -> Any:
        """Train; SIGINT and SIGTERM stop it between two batches.

        Raises:
            Interrupted: After SIGINT, a `KeyboardInterrupt`.
            Terminated: After SIGTERM, a `SystemExit` of code 143.
            SaveError: If the disk is full or the run's folder can no longer be written to.
            DataError: If an image can no longer be read.
        """
        if RANK != -1:  # one of several ranks: it must not leave the others waiting, so signals end all of them at once
            return super().train()
        with SignalWatch(terminate_children if self.ddp else None) as self._watch:
            try:
                return super().train()
            except subprocess.CalledProcessError as error:  # the launcher of the ranks
                if self._watch.received is None:
                    raise
                stop = self._stop()
                LOGGER.warning(str(stop))
                raise stop from error
            except (Interrupted, Terminated) as stop:
                LOGGER.warning(str(stop))
                raise

    def _do_train(self) -> None:
        try:
            super()._do_train()
        except _NothingToTrain:
            self._finish()
        except (Interrupted, Terminated) as stop:
            self._save_position()
            raise self._stop() from stop
        except Exception as error:
            if self._watch.received is not None:  # workers that load data got the signal as well, and died of it
                self._save_position()
                raise self._stop() from error
            if (sentence := self._sentence(error)) is None:
                raise
            if isinstance(sentence, DataError):
                self._save_position()
            raise sentence from error

    def _finish(self) -> None:
        """Do what comes after the last epoch, for a run that was killed there."""
        LOGGER.info(f"All {self.start_epoch} epochs of {self.args.model} are trained; finishing")
        self.epoch = self.start_epoch - 1
        self.final_eval()
        if RANK in {-1, 0}:
            if self.args.plots:
                self.plot_metrics()
            self.run_callbacks("on_train_end")
        for loader in (self.train_loader, self.test_loader):
            loader.close()

    def _sentence(self, error: Exception) -> YoloKDError | None:
        """Return what to tell the user of an error that is not the program's."""
        text = str(error)
        go_on = saving.resume_command(self.last, self.alone)
        if isinstance(error, FileNotFoundError) and (found := _IMAGE_GONE.search(text)):
            again = f"go on with: {go_on}" if self.last.exists() or self._unsaved else "start the run again."
            return DataError(
                f"image {found[1]} cannot be read any more: it was removed or damaged while training. "
                f"Put it back, or delete it to train without it, and {again}"
            )
        if any(text.startswith(start) or f": {start}" in text for start in _NOTHING_TO_LEARN):
            return DataError(f"data={self.args.data} cannot be trained on: {' '.join(text.split())}")
        return saving.unwritable(error, self.last, self.alone) if isinstance(error, OSError) else None

    def _stop(self) -> BaseException:
        """Return what to raise for the signal that arrived, with the command that goes on."""
        place = ""
        if self._seen:
            done, batches = self._skipped + self._seen, len(self.train_loader)
            place = f" in epoch {self.epoch + 1} of {self.epochs}, after {done} of {batches} batches"
        command = saving.resume_command(self.last, self.alone)
        then = f"Go on with: {command}" if self.last.exists() else "There is no checkpoint yet: start the run again."
        return self._watch.stop(f"Stopped by {self._watch.name}{place}. {then}")

    def run_callbacks(self, event: str) -> None:
        """Keep count of batches, and stop where a signal has asked for it, after everyone else was called."""
        super().run_callbacks(event)
        if event == "on_train_start":
            self._watch.patient = True
            if RANK in {-1, 0}:
                self._keepsake.remember(*_small_files(self))
            if self._only_finish:
                raise _NothingToTrain
            # not before: callbacks are handed to the processes of a multi-GPU run
            self.add_callback("on_val_batch_end", lambda _: self._stop_if_asked())
        elif event == "on_train_epoch_start":
            self._begin_epoch()
            self._stop_if_asked()
        elif event == "on_train_batch_end":
            self._seen += 1
            self._unsaved += 1
            self._stop_if_asked()
        elif event == "on_train_epoch_end":
            self._end_epoch()

    def _stop_if_asked(self) -> None:
        if self._watch.received is not None:
            raise self._watch.stop("")

    def _begin_epoch(self) -> None:
        self._seen = self._skipped = 0
        if self._position is not None and self.epoch == self.start_epoch:
            batches = len(self.train_loader)
            self._skipped = self._position.done(batches)
            self.train_loader = RestOfEpoch(self.train_loader, batches - self._skipped)

    def _end_epoch(self) -> None:
        if isinstance(self.train_loader, RestOfEpoch):
            self.train_loader = self.train_loader.loader
            self.train_loader.reset()  # or the next epoch would begin with what this one left over
            self.tloss = self._losses()
            self._position = None

    def _losses(self) -> dict[str, Any]:
        """Return the mean losses of the epoch so far, those from before the run was resumed included."""
        losses = self.tloss or {}
        return losses if self._position is None else self._position.merged(losses, self._skipped, self._seen)

    # ---------------------------------------------------------------------------------------------- files

    def save_model(self) -> bool:
        """Save as Ultralytics does, each file whole or not at all."""
        if self.best_fitness is not None and not self.best.exists():
            self.best_fitness = self.fitness  # the best of those that are left
        with saving.recorded(self) as files:
            saved = super().save_model()
        for name, data in files.items():
            self._write(self.wdir / name, data)
        self._unsaved = 0
        return saved

    def _write(self, path: Path, data: bytes) -> None:
        keep = saving.previous_of(path) if path == self.last and self._last_is_ours else None
        saving.write_atomically(path, data, keep=keep)
        self._last_is_ours |= path == self.last

    def _save_position(self) -> None:
        """Write a `last.pt` that goes on inside the current epoch, unless the last one knows as much.

        It counts as the checkpoint of the epoch before, whose row is the last in `results.csv`.
        """
        if RANK not in {-1, 0} or not self._unsaved or self.loss is None or not bool(self.loss.isfinite()):
            return
        done = self._skipped + self._seen
        self.epoch -= 1
        try:
            with saving.recorded(self) as files:
                super().save_model()
            data = files[self.last.name]
            if done:
                losses = {name: float(value) for name, value in self._losses().items()}
                data = saving.with_entry(data, POSITION, Position(done, len(self.train_loader), losses).to_dict())
            self._write(self.last, data)
        except OSError as error:
            raise saving.unwritable(error, self.last, self.alone) or error from error
        finally:
            self.epoch += 1
        self._unsaved = 0

    def save_metrics(self, metrics: dict) -> None:
        """Append to `results.csv`, whose time goes on where the run was resumed."""
        if gone := self._keepsake.bring_back():
            LOGGER.warning(
                f"{self.save_dir} was emptied or removed while training. {', '.join(gone)} were written again; "
                "checkpoints of earlier epochs are lost."
            )
        self.train_time_start -= self._time_before
        try:
            super().save_metrics(metrics)
        finally:
            self.train_time_start += self._time_before
        self._keepsake.remember(self.csv)

    def provenance(self) -> dict[str, Any]:
        """Return plain entries that the finished checkpoints hold besides Ultralytics' own."""
        return {}

    def finish_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Change a checkpoint of the run before it is stripped and evaluated; one that is finished stays as it is."""

    def final_eval(self) -> None:
        """Strip and evaluate the finished checkpoints as Ultralytics does, each replaced whole."""
        load = torch_utils.torch_load

        def load_to_strip(*args: Any, **keys: Any) -> Any:
            checkpoint = load(*args, **keys)
            self.finish_checkpoint(checkpoint)
            return checkpoint

        with (
            patch.object(torch_utils, "torch_load", load_to_strip),
            saving.stripping_atomically(engine, self.last, self.provenance(), quiet),
        ):
            super().final_eval()


class _NothingToTrain(Exception):
    """All epochs of the run that is resumed are done."""


_IMAGE_GONE = re.compile(r"Image Not Found (.+)")
_NOTHING_TO_LEARN = ("No valid images found", "No labels found")


def _small_files(trainer: DetectionTrainer) -> tuple[Path, ...]:
    return tuple(trainer.save_dir / name for name in ("args.yaml", "kd.yaml", "results.csv"))
