"""What taps and trainer.py rely on in Ultralytics, checked by itself.

Ultralytics changes quickly. When one of these fails after an upgrade, its message says what has moved and where this
package counts on it; the other tests may then fail for reasons that are harder to read.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ultralytics.data import build_dataloader
from ultralytics.data import dataset as ultralytics_dataset
from ultralytics.data import utils as data_utils
from ultralytics.data.base import BaseDataset
from ultralytics.data.dataset import YOLODataset
from ultralytics.engine import trainer as engine
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.engine.validator import BaseValidator
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.nn import tasks
from ultralytics.nn.modules.head import Detect
from ultralytics.utils import DEFAULT_CFG_DICT, torch_utils
from ultralytics.utils.loss import E2ELoss, v8DetectionLoss


def parameters(function: Callable) -> list[str]:
    return list(inspect.signature(function).parameters)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (DetectionTrainer.__init__, ["self", "cfg", "overrides", "_callbacks"]),
        (BaseTrainer.check_resume, ["self", "overrides"]),
        (BaseTrainer.build_optimizer, ["self", "model", "name", "lr", "momentum", "decay", "iterations"]),
        (BaseTrainer.resume_training, ["self", "ckpt"]),
        (BaseTrainer._load_checkpoint_state, ["self", "ckpt"]),
        (BaseTrainer._setup_train, ["self"]),
        (BaseTrainer._do_train, ["self"]),
        (BaseTrainer.train, ["self"]),
        (BaseTrainer.optimizer_step, ["self"]),
        (BaseTrainer._build_train_pipeline, ["self"]),
        (BaseTrainer._handle_nan_recovery, ["self", "epoch"]),
        (engine.get_save_dir, ["args", "name"]),
        (engine.generate_ddp_command, ["trainer"]),
        (ultralytics_dataset.save_dataset_cache_file, ["prefix", "path", "x", "version"]),
        (BaseTrainer.final_eval, ["self"]),
        (BaseTrainer.save_model, ["self"]),
        (BaseTrainer.save_metrics, ["self", "metrics"]),
        (BaseTrainer.run_callbacks, ["self", "event"]),
        (engine.strip_optimizer, ["f", "s", "updates"]),
        (BaseTrainer.label_loss_items, ["self", "loss_items", "prefix"]),
        (DetectionTrainer.set_model_attributes, ["self"]),
        (DetectionTrainer.preprocess_batch, ["self", "batch"]),
        (DetectionTrainer.get_validator, ["self"]),
        (engine.autocast, ["enabled", "device"]),
        (tasks.torch_safe_load, ["weight", "safe_only"]),
        (Detect.forward_head, ["self", "x", "box_head", "cls_head"]),
        (v8DetectionLoss.loss, ["self", "preds", "batch"]),
        (BaseTrainer.get_dataset, ["self"]),
        (DetectionTrainer.build_dataset, ["self", "img_path", "mode", "batch"]),
        (DetectionTrainer.get_dataloader, ["self", "dataset_path", "batch_size", "rank", "mode"]),
        (BaseDataset.get_img_files, ["self", "img_path"]),
        (YOLODataset.get_labels, ["self"]),
        (YOLODataset.close_mosaic, ["self", "hyp"]),
    ],
    ids=lambda value: getattr(value, "__qualname__", ""),
)
def test_signatures(function: Callable, expected: list[str]) -> None:
    found = parameters(function)
    assert found == expected, (
        f"{function.__qualname__} now takes {found}; yolo_kd/trainer.py or yolo_kd/taps overrides it"
    )


def said(function: Any, *phrases: str) -> None:
    source = inspect.getsource(function)
    for phrase in phrases:
        assert phrase in source, f"{function.__name__} no longer contains '{phrase}', on which yolo_kd counts"


def test_order_of_the_set_up() -> None:
    """The criterion is hung on in set_model_attributes: after the model is on its device, before the EMA copies it."""
    source = inspect.getsource(BaseTrainer._setup_train)
    steps = ["self.setup_model()", ".to(self.device)", "set_model_attributes()", "_build_train_pipeline()", "ModelEMA("]
    found = [source.index(step) for step in [*steps, "resume_training(ckpt)"]]
    assert found == sorted(found), "the order of BaseTrainer._setup_train has changed"


def test_the_native_loss_is_made_of_branches() -> None:
    """taps.weighted_by replaces a branch's `loss` and weights what its assigner answers."""
    said(E2ELoss.__call__, "self.one2many.loss(one2many, batch)", "self.one2one.loss(one2one, batch)")
    said(v8DetectionLoss.__call__, "self.loss(self.parse_output(preds), batch)")
    said(
        v8DetectionLoss.get_assigned_targets_and_loss,
        "_, target_bboxes, target_scores, fg_mask, target_gt_idx = self.assigner(",
        "target_scores_sum = target_scores.sum().clamp_(min=1)",
    )
    said(v8DetectionLoss.preprocess, "torch.arange(nl, device=self.device) - offsets[batch_idx]")


def test_the_loader_of_a_training() -> None:
    """pool_data.py repeats how Ultralytics makes it, and serves what is asked of loader, sampler and data set."""
    said(BaseTrainer._build_train_pipeline, "len(self.train_loader.sampler) % self.train_loader.batch_size")
    said(BaseTrainer._do_train, "self.train_loader.sampler.set_epoch(epoch)")
    said(DetectionTrainer.get_class_counts, "self.train_loader.dataset.labels")
    said(
        build_dataloader,
        "nw = min(os.cpu_count() // max(nd, 1), workers, 0 if batches <= 1 else batches)",
        "generator.manual_seed((6148914691236517205 + RANK + seed) % (1 << 64))",
        "prefetch_factor=(4 if shuffle else 2) if nw > 0 else None",
        "worker_init_fn=seed_worker",
    )


def test_the_loop() -> None:
    said(
        BaseTrainer._do_train,
        'autocast(torch.bfloat16 if self.args.amp == "bf16" else self.amp, device=self.device.type)',
        "batch = self.preprocess_batch(batch)",
        "self.loss_names = tuple(self.loss_items)",
        "criterion.update()",
    )


def test_what_follows_a_failed_epoch() -> None:
    """Running out of memory builds the loaders again; NaN in the last batch's loss goes back to last.pt."""
    said(
        BaseTrainer._do_train,
        '"out of memory" in str(e).lower()',
        "if epoch > self.start_epoch or self._oom_retries >= 3",
        "self._build_train_pipeline()",
        "self._handle_nan_recovery(epoch)",
    )
    said(BaseTrainer._handle_nan_recovery, "self.loss.isfinite()", "self._load_checkpoint_state(ckpt)")


def test_what_several_processes_share() -> None:
    said(BaseTrainer.__init__, "self.save_dir = get_save_dir(self.args)")
    said(ultralytics_dataset, "save_dataset_cache_file(self.prefix, path, x, DATASET_CACHE_VERSION)")
    said(engine.generate_ddp_command, "shutil.rmtree(trainer.save_dir)")
    said(BaseTrainer._do_train, "self.loss *= self.world_size")


def test_what_is_written_and_when() -> None:
    """Checkpoints go through three paths as bytes; a row of the table comes before its checkpoint."""
    said(
        BaseTrainer.save_model,
        "self.wdir.mkdir(parents=True, exist_ok=True)",
        "self.last.write_bytes(serialized_ckpt)",
        "self.best.write_bytes(serialized_ckpt)",
        '(self.wdir / f"epoch{self.epoch}.pt").write_bytes(serialized_ckpt)',
    )
    said(BaseTrainer.final_eval, "strip_optimizer(self.last)", "strip_optimizer(self.best, updates=")
    said(BaseTrainer.save_metrics, "t = time.time() - self.train_time_start", '"%.6g,"')
    said(BaseTrainer.resume_training, "0 < start_epoch < self.epochs")
    source = inspect.getsource(BaseTrainer._do_train)
    steps = ["on_train_start", "on_train_epoch_start", "enumerate(self.train_loader)", "on_train_batch_start"]
    steps += ["on_train_batch_end", "on_train_epoch_end", "self.validate()", "self.save_metrics(", "self.save_model()"]
    found = [source.index(step) for step in steps]
    assert found == sorted(found), "the order of BaseTrainer._do_train has changed"


def test_lost_data_is_told_in_these_words() -> None:
    from ultralytics.data.base import BaseDataset
    from ultralytics.data.dataset import YOLODataset

    said(BaseDataset.load_image, "Image Not Found {f}")
    said(YOLODataset.cache_labels, "No labels found in ")
    said(YOLODataset.get_labels, "No valid images found in ")


def test_resume_replaces_the_criterion_of_end_to_end_heads() -> None:
    said(BaseTrainer.resume_training, "model.criterion = model.init_criterion()")


def test_checkpoint_state_passes_the_optimizer_hooks() -> None:
    said(
        BaseTrainer._load_checkpoint_state, 'self.optimizer.load_state_dict(ckpt["optimizer"])', "ModelEMA(self.model)"
    )
    said(BaseTrainer.save_model, "self.optimizer.state_dict()")
    for hook in ("register_state_dict_post_hook", "register_load_state_dict_pre_hook"):
        assert hasattr(torch.optim.Optimizer, hook), f"torch.optim.Optimizer.{hook} is gone; adapters ride on it"


def test_optimizer_builder_looks_for_a_student_by_name() -> None:
    said(BaseTrainer.build_optimizer, 'getattr(target, "student_model", target).model[-1]', "named_modules()")


def test_validator_checks_every_key() -> None:
    said(BaseValidator.__init__, "get_cfg(overrides=args)")
    assert "kd" not in DEFAULT_CFG_DICT, "Ultralytics has a key 'kd' of its own now"


def test_restricted_loading_has_one_switch() -> None:
    assert isinstance(tasks.SAFE_LOAD, bool)
    assert tasks._SafeLoad.SUPPORTED, "restricted loading is not supported by this torch"
    said(tasks.torch_safe_load, "safe_only = SAFE_LOAD", "weights_only=True")


def test_what_is_replaced_while_strangers_files_are_read() -> None:
    said(tasks.torch_safe_load, "with _SafeLoad.loading(file):")
    said(tasks.yaml_model_load, "YAML.load(")
    said(torch_utils.strip_optimizer, "x = torch_load(f, map_location=")
    said(data_utils.check_det_dataset, "data = YAML.load(file, append_filename=True)", "exec(s,")
    said(
        ultralytics_dataset.YOLODataset._load_or_scan_cache, "load_dataset_cache_file(cache_path)", "except Exception:"
    )


def test_raw_outputs_of_both_kinds_of_head() -> None:
    plain = tasks.DetectionModel("yolov8n.yaml", nc=3, verbose=False).train()
    raw = plain(torch.zeros(1, 3, 64, 64))
    assert set(raw) == {"boxes", "scores", "feats"}, "Detect no longer returns boxes, scores and feats in training"
    assert raw["boxes"].shape == (1, 64, 84)
    assert raw["scores"].shape == (1, 3, 84)
    dual = tasks.DetectionModel("yolo26n.yaml", nc=3, verbose=False).train()
    raw = dual(torch.zeros(1, 3, 64, 64))
    assert set(raw) == {"one2many", "one2one"}
    assert raw["one2many"]["feats"][0].requires_grad, "the one-to-many branch no longer feeds the neck"
    assert not raw["one2one"]["feats"][0].requires_grad
    assert dual.model[-1].reg_max == 1


def test_native_losses() -> None:
    said(v8DetectionLoss.loss, "loss * batch_size")
    said(v8DetectionLoss.get_assigned_targets_and_loss, "self.assigner(")
    said(E2ELoss.__init__, "self.one2many", "self.one2one")


def test_what_a_check_switches_off() -> None:
    """The dry run of a check replaces these names (check/dryrun.py), so they must be looked up there."""
    said(ultralytics_dataset.YOLODataset.cache_labels, "save_dataset_cache_file(", "self.verify_args()")
    said(ultralytics_dataset.YOLODataset._load_or_scan_cache, "load_dataset_cache_file(", "self.cache_labels(")
    said(ultralytics_dataset.YOLODataset.verify_args, "return verify_image_label,")
    said(data_utils.verify_image_label, "ignoring corrupt image/label: ", "duplicate labels removed", "check_image(")
    said(data_utils.check_image, "_replace_image(im_file, lambda tmp:", "corrupt JPEG restored and saved")
    said(BaseTrainer.__init__, "callbacks.add_integration_callbacks(self)")
    said(BaseTrainer._setup_train, "check_amp(self.model)")
    assert parameters(data_utils.verify_image_label) == ["args"]
    assert parameters(ultralytics_dataset.save_dataset_cache_file) == ["prefix", "path", "x", "version"]
    assert parameters(ultralytics_dataset.load_dataset_cache_file) == ["path"]
    assert parameters(data_utils._replace_image) == ["im_file", "write"]
