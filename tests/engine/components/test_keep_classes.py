"""New classes beside old ones: the list of classes, labels, the shielded task loss, and the extended head."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from ultralytics.cfg import get_cfg
from ultralytics.nn.tasks import DetectionModel

from tests.support.host import Host
from tests.support.models import narrow_checkpoint, narrow_model, narrow_yaml
from yolo_kd.config.class_options import ClassOptions
from yolo_kd.engine.components.keep_classes import KeepClasses
from yolo_kd.engine.components.kept_head import KeptClasses, check_extendable, extend_head
from yolo_kd.errors import PairError
from yolo_kd.safe_loading.checkpoint import load_detector
from yolo_kd.upstream.task_loss import ABSENT

OLD = {0: "cat", 1: "Traffic Light", 2: "dog"}


def kept(data: dict[int, str], confidence: float = 0.05) -> KeptClasses:
    return KeptClasses.of(OLD, data, confidence)


# ------------------------------------------------------------------------------------------------ the list of classes


def test_new_classes_come_after_the_teachers() -> None:
    found = kept({0: "raccoon", 1: "traffic_light", 2: "fox"})
    assert found.by_index == {0: "cat", 1: "Traffic Light", 2: "dog", 3: "raccoon", 4: "fox"}
    assert found.index_of == (3, 1, 4)
    assert found.unlabeled == (0, 2)
    assert found.classes.sources == ((0,), (1,), (2,), (), ())
    assert found.classes.matched == (0, 1, 2)


@pytest.mark.parametrize(
    ("teacher", "data", "message"),
    [
        (OLD, {0: "DOG", 1: "cat"}, r"already has every class of the data set \(DOG, cat\)"),
        (OLD, {0: "0"}, r"those of the data set are meaningless \(0\)"),
        ({0: "class0"}, {0: "fox"}, r"those of the teacher are meaningless \(class0\)"),
        (OLD, {0: "fox", 1: "Fox"}, "the data set has two classes of the same name"),
    ],
)
def test_names_that_do_not_say_what_is_new(teacher: dict, data: dict, message: str) -> None:
    with pytest.raises(PairError, match=message):
        KeptClasses.of(teacher, data, 0.05)


def test_labels_count_in_the_classes_of_the_run() -> None:
    labels: list[dict[str, Any]] = [
        {"cls": np.array([[0.0], [1.0], [2.0], [0.0]], dtype=np.float32), "bboxes": np.zeros((4, 4))},
        {"cls": np.zeros((0, 1), dtype=np.float32), "bboxes": np.zeros((0, 4))},
    ]
    kept({0: "raccoon", 1: "traffic light", 2: "fox"}).renumber(labels)
    assert labels[0]["cls"].tolist() == [[3.0], [1.0], [4.0], [3.0]]
    assert labels[0]["cls"].dtype == np.float32
    assert labels[1]["cls"].shape == (0, 1)


# ------------------------------------------------------------------------------------------------ the task loss

SIZE = 64
POINTS = 64 + 16 + 4


def student(family: str, folder: Path, nc: int) -> DetectionModel:
    model = narrow_model(family, folder, nc=nc)
    model.args = get_cfg()
    return model.train()


def batch_of(labels: list[int]) -> dict[str, torch.Tensor]:
    count = len(labels)
    return {
        "img": torch.rand(2, 3, SIZE, SIZE),
        "cls": torch.tensor(labels, dtype=torch.float32).view(-1, 1),
        "bboxes": torch.tensor([[0.5, 0.5, 0.4, 0.4]]).repeat(count, 1),
        "batch_idx": torch.arange(count) % 2,
    }


def branches(predictions: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {k: predictions[k] for k in ("one2many", "one2one")} if "one2many" in predictions else {"": predictions}


@pytest.mark.parametrize("family", ["yolov8n", "yolo26n"])
def test_nobody_denies_an_old_class_that_the_teacher_sees(family: str, tmp_path: Path) -> None:
    """The gradient is exactly zero where it sees one, and what it was everywhere else, in every branch."""
    found = kept({0: "raccoon", 1: "traffic light"})  # run: cat, traffic light, dog, raccoon
    model = student(family, tmp_path, 4)
    criterion = model.init_criterion()
    batch = batch_of([3, 1])
    predictions = model(batch["img"])
    seen = torch.zeros(2, POINTS, dtype=torch.bool)
    seen[0, 10:30] = seen[1, 70] = True
    teacher = torch.full((2, POINTS, 3), -9.0)
    teacher[..., 2] = torch.where(seen, torch.tensor(0.0), teacher[..., 2])
    teacher[..., 1] = 5.0  # the data set labels traffic lights: what the teacher sees of them hides nothing

    def gradients(shielded: bool) -> dict[str, torch.Tensor]:
        given = found.shield(predictions, teacher) if shielded else predictions
        loss = criterion(given, batch)[0].sum()
        scores = {name: branch["scores"] for name, branch in branches(predictions).items()}
        return dict(zip(scores, torch.autograd.grad(loss, [*scores.values()], retain_graph=True), strict=True))

    hidden = torch.zeros(2, 4, POINTS, dtype=torch.bool)
    hidden[:, 0], hidden[:, 2] = seen, seen
    free, bare = gradients(True), gradients(False)
    assert len(bare) == (2 if family == "yolo26n" else 1)
    for name, before in bare.items():
        assert (before[hidden] != 0).all()
        assert (free[name][hidden] == 0).all()
        assert torch.equal(free[name][~hidden], before[~hidden])


def test_a_shielded_score_has_no_value_either() -> None:
    loss = nn.BCEWithLogitsLoss(reduction="none")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        score = torch.tensor([ABSENT]).to(dtype)
        assert loss(score.float(), torch.zeros(1)).item() == 0
        assert score.sigmoid().item() == 0


def test_the_confidence_decides() -> None:
    predictions = {"scores": torch.zeros(1, 4, 2), "boxes": torch.zeros(1, 64, 2), "feats": []}
    teacher = torch.tensor([[[0.04, 0.9, 0.04], [0.06, 0.01, 0.01]]]).logit()
    found = kept({0: "raccoon", 1: "traffic light"}).shield(predictions, teacher)
    assert found["scores"][0].tolist() == [[0, ABSENT], [0, 0], [0, ABSENT], [0, 0]]
    assert found["boxes"] is predictions["boxes"]
    higher = kept({0: "raccoon", 1: "traffic light"}, 0.5).shield(predictions, teacher)
    assert torch.equal(higher["scores"], predictions["scores"])
    decoded, raw = kept({0: "raccoon"}).shield((None, predictions), teacher)
    assert decoded is None
    assert (raw["scores"] == ABSENT).sum() == 6


# ------------------------------------------------------------------------------------------------ the extended head


def trained(family: str, folder: Path, nc: int) -> DetectionModel:
    """Return a detector whose normalisations hold statistics, as after a training."""
    model = narrow_model(family, folder, nc=nc, seed=3).eval()
    model.names = {i: f"thing {chr(97 + i % 26)}{i}" for i in range(nc)}
    generator = torch.Generator().manual_seed(5)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
    return model


def raw_of(model: nn.Module, images: torch.Tensor) -> dict[str, Any]:
    with torch.no_grad():
        return model.eval()(images)[1]


@pytest.mark.parametrize("loaded", [True, False], ids=["after Ultralytics' own loading", "from shapes that agree"])
@pytest.mark.parametrize("family", ["yolov3", "yolov6n", "yolov8n", "yolov9t", "yolov10n", "yolo11n", "yolo26n"])
def test_old_classes_keep_their_logits(family: str, loaded: bool, tmp_path: Path) -> None:
    """80 classes in another order and one more; the branch widens from 80 to 81 unless its width was taken over."""
    old = trained(family, tmp_path, 80)
    order = [(7 * i) % 80 for i in range(80)]
    names = [old.names[i].upper().replace(" ", "_") for i in order] + ["raccoon"]
    torch.manual_seed(8)
    new = DetectionModel(str(narrow_yaml(family, tmp_path, nc=81)), nc=81, verbose=False)
    fresh = deepcopy(new.model[-1]).state_dict()
    if loaded:
        new.names = dict(enumerate(names))
        new.load(old, verbose=False)
    else:
        state = new.state_dict()
        new.load_state_dict({k: v if v.shape == state[k].shape else state[k] for k, v in old.state_dict().items()})
        assert new.model[-1].cv3[0][-1].in_channels == old.model[-1].cv3[0][-1].in_channels + 1
    check_extendable(new, old, names[:80], "student.pt")
    extend_head(new, old, names)
    images = torch.rand(2, 3, 64, 64)
    before, after = branches(raw_of(old, images)), branches(raw_of(new, images))
    assert before.keys() == after.keys()
    for name, was in before.items():
        torch.testing.assert_close(after[name]["scores"][:, :80], was["scores"][:, order], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(after[name]["boxes"], was["boxes"])
    if not loaded:  # what is new is as random as it was made
        for key in ("cv3.0.2.weight", "cv3.0.2.bias"):
            assert torch.equal(new.model[-1].state_dict()[key][80], fresh[key][80]), key
    assert new.model[-1].cv3[0][-1].bias[80].item() < -4
    assert sum(p.grad is not None for p in new.parameters()) == 0


def test_heads_that_cannot_be_extended(tmp_path: Path) -> None:
    old = trained("yolov8n", tmp_path, 3)
    names = [*old.names.values()]
    new = narrow_model("yolov8n", tmp_path, nc=4)
    check_extendable(new, old, names, "s.pt")
    with pytest.raises(PairError, match=r"student=s\.pt lacks fox"):
        check_extendable(new, old, [*names, "fox"], "s.pt")
    fused = deepcopy(old).fuse(verbose=False)
    with pytest.raises(PairError, match="its layers are fused"):
        check_extendable(new, fused, names, "s.pt")
    wide = trained("yolov8n", tmp_path, 80)
    with pytest.raises(PairError, match=r"cv3\.0\.0\.conv\.weight is \(80, .* and would become \(32, "):
        check_extendable(new, wide, [*wide.names.values()][:3], "s.pt")
    ends = trained("yolo26n", tmp_path, 3)
    ends.model[-1].one2one_cv3 = None
    with pytest.raises(PairError, match="its branch one2one_cv3 was removed"):
        check_extendable(narrow_model("yolo26n", tmp_path, nc=4), ends, names, "s.pt")
    other: Any = SimpleNamespace(names=old.names, model=[nn.Identity()])
    with pytest.raises(PairError, match="it is Identity without class branches; a Detect head is needed"):
        check_extendable(new, other, names, "s.pt")


# ------------------------------------------------------------------------------------------------ the component alone


def test_alone_it_extends_the_classes_and_blends_the_finished_weights(tmp_path: Path, shapes: Path) -> None:
    names = {0: "cat", 1: "circle"}
    teacher = load_detector(str(narrow_checkpoint("yolov8n", tmp_path, nc=2, names=names)), role="teacher")
    options = ClassOptions(keep_classes="teacher", keep_blend=0.5)
    host: Any = Host(lambda trainer: KeepClasses(trainer, options, teacher), tmp_path, data=str(shapes), batch=4)
    assert host.data["names"] == {0: "cat", 1: "circle", 2: "square", 3: "triangle"}
    model = host.model = host.get_model(narrow_yaml("yolov8n", tmp_path / "yaml"), teacher.model, verbose=False)
    assert (model.model[-1].nc, host.args.freeze) == (4, 22)
    dataset = host.build_dataset(host.data["val"], "val", 4)
    assert {int(c) for label in dataset.labels for c in label["cls"].flatten()} == {1, 2, 3}
    host.freeze_layer_names = [f"model.{i}." for i in range(22)]
    optimizer = host.build_optimizer(model, name="SGD", lr=0.01, momentum=0.9, decay=0.0, iterations=10)
    start = optimizer.state_dict()["yolo_kd_start"]
    assert start
    assert all(name.startswith("model.22.") for name in start)
    name = "model.22.cv2.0.0.conv.weight"
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    checkpoint = {"model": deepcopy(model)}
    host.finish_checkpoint(checkpoint)
    torch.testing.assert_close(checkpoint["model"].state_dict()[name], start[name] + 0.5)
