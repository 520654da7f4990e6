"""Wrong input: every mistake ends in exit code 2 and one to three lines, and leaves every file as it was.

One table, one test. A row is a command line and a pattern that its message must match; `{name}` stands for a file of
`bad_files`, which lie in the folder that the command runs in. A row for `train` is completed with a good teacher,
student and data set where it does not name them.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from ultralytics.cfg import DEFAULT_CFG_DICT
from ultralytics.nn.tasks import SegmentationModel

from tests.support.models import narrow_checkpoint, narrow_yaml
from yolo_kd.cli import main

NAMES = "names: [circle, square, triangle]\n"
SPLITS = "train: images/train\nval: images/val\n"
RECIPE = "losses:\n  objectness:\n"
EXPERIMENT = "teacher: good.pt\nstudent: small.pt\ndata: shapes/data.yaml\n"

TEXTS: dict[str, str] = {
    # data
    "data_empty.yaml": "",
    "data_list.yaml": "- a\n- b\n",
    "data_broken.yaml": "train: [\n",
    "data_noval.yaml": f"path: shapes\ntrain: images/train\n{NAMES}",
    "data_notrain.yaml": f"path: shapes\nval: images/val\n{NAMES}",
    "data_gone.yaml": f"path: shapes\ntrain: images/train\nval: nowhere\n{NAMES}",
    "data_gone_train.yaml": f"path: shapes\ntrain: nowhere\nval: images/val\n{NAMES}",
    "data_nonames.yaml": f"path: shapes\n{SPLITS}",
    "data_two.yaml": f"path: shapes\n{SPLITS}nc: 2\n{NAMES}",
    "data_nc.yaml": f"path: shapes\n{SPLITS}nc: many\n",
    "data_script.yaml": f"path: nowhere\n{SPLITS}{NAMES}download: |\n  open('ran', 'w')\n",
    "data_bash.yaml": f"path: nowhere\n{SPLITS}{NAMES}download: bash fetch.sh\n",
    "data_bomb.yaml": "".join(
        f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 10) if i else 'lol'}]\n" for i in range(10)
    ),
    "data_deep.yaml": "[" * 2000 + "]" * 2000,
    "data_four.yaml": f"path: shapes\n{SPLITS}names: [a, b, c, d]\n",
    "data_channels.yaml": f"path: shapes\n{SPLITS}{NAMES}channels: 1\n",
    "data_types.yaml": f"path: 3\n{SPLITS}{NAMES}",
    # recipes
    "kd_empty.yaml": "",
    "kd_list.yaml": "- objectness\n",
    "kd_nolosses.yaml": "loses:\n  objectness:\n",
    "kd_unknown.yaml": "losses:\n  fdg:\n",
    "kd_twice.yaml": "losses:\n  objectness:\n  objectness:\n",
    "kd_text.yaml": f"{RECIPE}    weight: 1e-3\n",
    "kd_zero.yaml": f"{RECIPE}    weight: 0\n",
    "kd_nan.yaml": f"{RECIPE}    weight: .nan\n",
    "kd_anchor.yaml": "losses: &a\n  objectness: *a\n",
    "kd_tag.yaml": "losses: !!python/object/apply:os.system ['touch ran']\n",
    "kd_deep.yaml": "losses: " + "[" * 50 + "]" * 50,
    "kd_plugin.yaml": f"plugins: [no_such_module_of_mine]\n{RECIPE}",
    "kd_plugin_text.yaml": f"plugins: ['../evil']\n{RECIPE}",
    "kd_schedule.yaml": f"{RECIPE}    schedule: {{kind: cosinus}}\n",
    "kd_layers.yaml": f"{RECIPE}    student_layers: [model.4]\n",
    "kd_latin.yaml": "",
    # experiments
    "cfg_empty.yaml": "",
    "cfg_list.yaml": "- a\n",
    "cfg_map.yaml": f"{EXPERIMENT}class_map: {{circel: circle}}\n",
    "cfg_key.yaml": f"{EXPERIMENT}epoch: 3\n",
    "cfg_cfg.yaml": f"{EXPERIMENT}cfg: other.yaml\n",
    "cfg_trust.yaml": f"{EXPERIMENT}trust_checkpoints: true\n",
    "cfg_name.yaml": f"{EXPERIMENT}name: ../../x\n",
    "cfg_project.yaml": f"{EXPERIMENT}project: /usr/elsewhere\n",
    "cfg_save_dir.yaml": f"{EXPERIMENT}save_dir: sub/../../x\n",
    "cfg_model.yaml": f"{EXPERIMENT}model: small.pt\n",
    # models
    "model_list.yaml": "- a\n",
    "model_noparts.yaml": "nc: 3\n",
    "model_row.yaml": "nc: 3\nbackbone:\n  - [-1, 1, Conv]\nhead: []\n",
    "model_many.yaml": "nc: 3\nbackbone:\n  - [-1, 1000000000, Conv, [8, 3, 2]]\nhead: []\n",
    "model_wide.yaml": "nc: 3\nbackbone:\n  - [-1, 1, nn.Linear, [1000000, 1000000]]\nhead: []\n",
    "model_huge.yaml": "nc: 3\nbackbone:\n  - [-1, 1, nn.Linear, [1000000000000, 10]]\nhead: []\n",
    "model_width.yaml": "nc: 3\nwidth_multiple: 1.0e+9\nbackbone:\n  - [-1, 1, Conv, [8, 3, 2]]\nhead: []\n",
    "model_eval.yaml": "nc: 3\nactivation: open('ran', 'w')\nbackbone:\n  - [-1, 1, Conv, [8, 3, 2]]\nhead: []\n",
    "model_module.yaml": "nc: 3\nbackbone:\n  - [-1, 1, DetectionModel, [\"'http://localhost:9/x.yaml'\"]]\nhead: []\n",
    "model_nohead.yaml": "nc: 3\nbackbone:\n  - [-1, 1, Conv, [8, 3, 2]]\nhead: []\n",
    "model.onnx": "",
    "text.pt": "not a pickle",
    "page.pt": "<!DOCTYPE html><html>Not found</html>",
    "pool_list.txt": "./pool_good/nothing.jpg\n./neither.jpg\n",
    "pointer.pt": "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 6\n",
    "empty.pt": "",
}  # fmt: skip


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory: pytest.TempPathFactory, shapes: Path) -> Path:
    """A folder of files, good and bad."""
    folder = tmp_path_factory.mktemp("input")
    for name, text in TEXTS.items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "kd_latin.yaml").write_bytes("# é\nlosses:\n".encode("latin-1"))
    shutil.copytree(shapes.parent, folder / "shapes", ignore=shutil.ignore_patterns("*.cache"))
    (folder / "shapes" / "data.yaml").write_text(f"path: {folder / 'shapes'}\n{SPLITS}{NAMES}", encoding="utf-8")
    good = narrow_checkpoint("yolov8n", folder, file="good.pt")
    narrow_checkpoint("yolov8n", folder, seed=1, file="small.pt")
    narrow_checkpoint("yolov8n", folder, nc=2, names={0: "a", 1: "b"}, file="two.pt")
    segment = SegmentationModel(str(narrow_yaml("yolov8n-seg", folder / "seg")), nc=3, verbose=False)
    segment.args = dict(DEFAULT_CFG_DICT)
    torch.save({"epoch": -1, "model": segment, "train_args": {}}, folder / "segment.pt")
    torch.save({"weights": torch.zeros(3)}, folder / "foreign.pt")
    torch.save(torch.zeros(3), folder / "tensor.pt")
    torch.save({"ema": torch.zeros(3), "model": None}, folder / "ema.pt")
    (folder / "short.pt").write_bytes(good.read_bytes()[:5000])
    (folder / "half.pt").write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    (folder / "folder.pt").mkdir()
    (folder / "empty_folder").mkdir()
    os.mkfifo(folder / "pipe.pt")
    (folder / "pool_broken").mkdir()
    (folder / "pool_broken" / "a.jpg").write_text("no image")
    (folder / "pool_broken" / "b.png").write_bytes(b"")
    shutil.copytree(folder / "shapes" / "images" / "test", folder / "pool_good")
    _checkpoints_to_resume(folder, good)
    return folder


def _checkpoints_to_resume(folder: Path, good: Path) -> None:
    """Write checkpoints of runs that were interrupted, each with one thing wrong."""
    content = torch.load(good, weights_only=False)
    plan = {
        "name": "objectness", "recipe": {"losses": {"objectness": {}}}, "teacher": str(good),
        "teacher_sha256": hashlib.sha256(good.read_bytes()).hexdigest(), "trust_checkpoints": False,
        "random_teacher": False, "inherit": False, "version": "0.1.0", "speed": {}, "class_options": {},
        "classes": None, "unlabeled": None,
    }  # fmt: skip
    weights = folder / "run" / "weights"
    weights.mkdir(parents=True)
    args = {
        "task": "detect",
        "data": str(folder / "shapes" / "data.yaml"),
        "save_dir": str(weights.parent),
        "epochs": 4,
    }

    def write(name: str, **changes: Any) -> None:
        kd = {k: v for k, v in {**plan, **changes.pop("kd", {})}.items() if v is not ...}
        train_args = {k: v for k, v in {**args, "kd": kd, **changes}.items() if v is not ...}
        torch.save({**content, "epoch": 1, "optimizer": {}, "train_args": train_args}, weights / f"{name}.pt")

    write("elsewhere", save_dir=str(folder / "other"))
    write("homeless", save_dir=...)
    write("url", data="https://localhost:9/data.yaml")
    write("gone", data=str(folder / "gone.yaml"))
    write("script", data=str(folder / "data_script.yaml"))
    write("giant", imgsz=10**6)
    write("device", device="99")
    write("distill", distill_model="good.pt")
    write("epochs", epochs="many")
    write("plugin", kd={"recipe": {"losses": {"objectness": {}}, "plugins": ["no_such_module_of_mine"]}})
    write("recipe", kd={"recipe": {"losses": {"fdg": {}}}})
    write("part", kd={"teacher": ...})
    write("kind", kd={"teacher": 3})
    write("classes", kd={"classes": {"teacher": ["a"], "student": ["b"], "sources": [[7]], "by": "name"}})
    write("renamed", kd={"classes": {"teacher": ["a"], "student": ["b"], "sources": [[0]], "by": "name"}})
    write("mapping", kd={"class_options": {"class_map": [1]}})
    write("teacher", kd={"teacher": str(folder / "no.pt")})
    write("other", kd={"teacher": str(folder / "small.pt")})
    write("endless", kd={"teacher": "/dev/zero"})
    nested: Any = "lol"
    for _ in range(18):
        nested = [nested] * 10
    write("nested", tracker=nested)
    torch.save({**content, "epoch": 1, "optimizer": {}, "train_args": [1]}, weights / "list.pt")
    torch.save({**content, "epoch": 1, "optimizer": {}, "train_args": args}, weights / "plain.pt")
    torch.save({**content, "epoch": 1, "optimizer": {}, "train_args": {**args, "kd": "fgd"}}, weights / "text.pt")
    torch.save({**content, "epoch": 1, "optimizer": {}, "train_args": {**args, "kd": None}}, weights / "null.pt")


# the command line without `yolo-kd`, and a pattern of what it must say
BAD: list[tuple[str, str]] = [
    # ------------------------------------------------------------------------------------------------ verbs
    ("trian", r"unknown verb 'trian'\. Did you mean 'train'\?"),
    ("teacher=a.pt student=b.pt", r"A verb comes first, such as: yolo-kd train teacher=a\.pt"),
    ("losses fdg", r"unknown loss 'fdg'\. Did you mean 'fgd'\?"),
    ("losses a b", "takes at most one name, received a b"),
    ("recipes objectnes", r"unknown recipe 'objectnes'\. Did you mean 'objectness'\?"),
    # ------------------------------------------------------------------------------------------------ key=value
    ("train epochs", r"'epochs' is not key=value\. Write epochs=<value>"),
    ("train --epochs 3", r"Write epochs=<value>, without dashes"),
    ("train =3", "'=3' has no key before '='"),
    ("train epochs=", r"'epochs=' has no value"),
    ("train epochs=3 epochs=4", "key 'epochs' is given twice: epochs=3 and epochs=4"),
    ("train epoch=3", r"unknown key 'epoch'\. Did you mean 'epochs'\?"),
    ("train freeze=[1,2", "opens a bracket that is never closed"),
    ("train epochs=three", "epochs=three' is of invalid type str. 'epochs' must be an int"),
    ("train epochs=0", "epochs=0' is an invalid value. 'epochs' must be >= 1"),
    ("train epochs=-3", "epochs=-3' is an invalid value"),
    ("train lr0=high", "lr0=high.* is of invalid type str"),
    ("train mosaic=1.5", "mosaic=1.5.* between 0.0 and 1.0"),
    ("train imgsz=0", "imgsz=0 is not a size .* pixels from 32 to 16384, such as imgsz=640"),
    ("train imgsz=-64", "imgsz=-64 is not a size .* pixels from 32 to 16384, such as imgsz=640"),
    ("train imgsz=big", "imgsz=big is not a size .* pixels from 32 to 16384, such as imgsz=640"),
    ("train batch=0", r"batch must be a whole number of at least 1 \(or -1.*received 0"),
    ("train batch=-7", "batch must be .*received -7"),
    ("train optimizer=SDG", r"optimizer=SDG .*Did you mean 'SGD'\?"),
    ("train device=99", "device=99 is not here: this torch sees .* Write device=cpu"),
    ("train device=banana", "device=banana is not here"),
    ("train amp=fp8", "amp=fp8' is invalid. Valid 'amp' values are True, False"),
    ("train workers=-1", "workers must be a number of at least 0, received -1"),
    ("train patience=-1", "'patience' must be >= 0"),
    ("train task=segment", "task=segment is not possible: this program does task=detect only"),
    ("train model={small.pt}", "key 'model' is not used here: write student="),
    ("train distill_model=x.pt", "write teacher= with kd=ultralytics"),
    ("train trust_checkpoints=1", "trust_checkpoints must be true or false, received 1"),
    ("train inherit=maybe", "inherit must be true, false or thinned, received 'maybe'"),
    ("train plugins=no_such_module_of_mine", "plugin 'no_such_module_of_mine' cannot be imported"),
    ("train plugins=[a/b]", r"plugins\[0\] must be the name of a module, received 'a/b'"),
    ("train pretrained={text.pt}", "pretrained=text.pt is not a loadable checkpoint"),
    ("train pretrained=no.pt", "pretrained=no.pt does not exist"),
    # ------------------------------------------------------------------------------------------------ kd=
    ("train kd=objectnes", r"unknown recipe 'objectnes'\. Did you mean 'objectness'\?"),
    ("train kd=none", "kd=none trains the student alone, but teacher="),
    ("train teacher=none kd=objectness", "kd is given but no teacher"),
    ("train kd.objectness.weight=-1", "must be a number of at least 0( or auto)?, received -1"),
    ("train kd.objectness.wieght=1", r"Did you mean 'weight'\?"),
    ("train kd.fgd.weight=1", "recipe 'default' has no loss 'fgd'"),
    ("train kd.objectness=1", "an override is written kd.objectness.<key>=value"),
    ("train kd=missing.yaml", "missing.yaml: no such file"),
    ("train kd={empty_folder}", "empty_folder"),
    ("train kd={kd_empty.yaml}", "kd_empty.yaml:1: a recipe must be a mapping with the key 'losses'; it is empty"),
    ("train kd={kd_list.yaml}", "kd_list.yaml:1: a recipe must be a mapping with the key 'losses'"),
    ("train kd={kd_nolosses.yaml}", r"unknown key 'loses' of a recipe\. Did you mean 'losses'\?"),
    ("train kd={kd_unknown.yaml}", r"kd_unknown.yaml:2: unknown loss 'fdg'\. Did you mean 'fgd'\?"),
    ("train kd={kd_twice.yaml}", "kd_twice.yaml:3: key 'objectness' is given twice, first in line 2"),
    ("train kd={kd_text.yaml}", r"kd_text.yaml:3: 1e-3 is read as text; write 1\.0e-3"),
    ("train kd={kd_zero.yaml}", "every weight is 0: nothing would be distilled"),
    ("train kd={kd_nan.yaml}", "kd_nan.yaml:3: weight of loss 'objectness' must be a number"),
    ("train kd={kd_anchor.yaml}", "no anchors and no aliases here"),
    ("train kd={kd_tag.yaml}", "kd_tag.yaml:1: the tag '!!python/object/apply:os.system' is not allowed"),
    ("train kd={kd_deep.yaml}", "nested more than 20 deep"),
    ("train kd={kd_plugin.yaml}", "kd_plugin.yaml:1: plugin 'no_such_module_of_mine' cannot be imported"),
    ("train kd={kd_plugin_text.yaml}", r"plugins\[0\] of a recipe must be the name of a module, received '\.\./evil'"),
    ("train kd={kd_schedule.yaml}", r"schedule of loss 'objectness'.*cosine"),
    ("train kd={kd_layers.yaml}", "layers"),
    ("train kd={kd_latin.yaml}", "kd_latin.yaml:1: not UTF-8 text"),
    # ------------------------------------------------------------------------------------------------ cfg=
    ("train cfg=missing.yaml", "missing.yaml: no such file"),
    ("train cfg={empty_folder}", "empty_folder: is a folder, not a file"),
    ("train cfg={cfg_empty.yaml}", "the experiment file is empty"),
    ("train cfg={cfg_list.yaml}", "an experiment must be a mapping of keys to values"),
    ("train cfg={cfg_key.yaml}", r"cfg_key.yaml:4: unknown key 'epoch'\. Did you mean 'epochs'\?"),
    ("train cfg={cfg_cfg.yaml}", "cfg_cfg.yaml:4: an experiment file cannot name another one"),
    ("train cfg={cfg_trust.yaml}", "cfg_trust.yaml:4: an experiment file cannot trust checkpoints for you"),
    ("train cfg={cfg_name.yaml}", r"cfg_name.yaml:4: name '\.\./\.\./x' leads out of the current folder"),
    ("train cfg={cfg_project.yaml}", "cfg_project.yaml:4: project '/usr/elsewhere' leads out of the current folder"),
    ("train cfg={cfg_save_dir.yaml}", "cfg_save_dir.yaml:4: save_dir 'sub/../../x' leads out of the current folder"),
    ("train cfg={cfg_model.yaml}", "cfg_model.yaml:4: key 'model' is not used here"),
    # ------------------------------------------------------------------------------------------------ models
    ("train teacher=no.pt", r"teacher=no\.pt does not exist"),
    ("train teacher=god.pt", r"Did you mean 'good\.pt'\?"),
    ("train teacher=nowhere/no.pt", "Its folder nowhere does not exist"),
    ("train teacher={empty_folder}", "is not a checkpoint: it must end in .pt"),
    ("train teacher={folder.pt}", "is a folder, not a checkpoint"),
    ("train teacher={pipe.pt}", "is a device or a pipe, not a file"),
    ("train teacher={model.onnx}", "is an ONNX file, not a checkpoint. Name the .pt file that it was exported from"),
    ("train teacher=https://localhost:9/x.pt", "is an address. Download the file first"),
    ("train teacher=" + "x" * 300 + ".pt", "cannot be read: File name too long"),
    ("train teacher={text.pt}", "is not a loadable checkpoint: it begins as no file of torch.save does"),
    ("train teacher={page.pt}", "it is a web page, so the download went wrong"),
    ("train teacher={pointer.pt}", "it is a pointer of Git LFS.*git lfs pull"),
    ("train teacher={empty.pt}", "is not a loadable checkpoint: the file is empty"),
    ("train teacher={short.pt}", "it is cut short, or something was appended"),
    ("train teacher={half.pt}", "it is cut short, or something was appended"),
    ("train teacher={foreign.pt}", "is not an Ultralytics checkpoint: it holds no model"),
    ("train teacher={tensor.pt}", "is not an Ultralytics checkpoint: it holds no model"),
    ("train teacher={ema.pt}", "is not an Ultralytics checkpoint: it holds no model"),
    ("train teacher={segment.pt}", r"is a model for the task 'segment'; a detector \(task 'detect'\) is needed"),
    ("train teacher={two.pt}", r"none of the 3 classes of .* the teacher's 2 \(a, b\)\. Say which is which, such as"),
    ("train teacher={two.pt} class_map=index", r"the teacher knows 2 \(a, b\), the data set has 3"),
    ("train class_map={}", r"class_map must be index or a mapping .* such as \{car: vehicle, .*\}, received '\{\}'"),
    ("train class_map=circle", "class_map must be index or a mapping"),
    ("train cfg={cfg_map.yaml}", r"the teacher has no class 'circel'\. Did you mean 'circle'\?"),
    ("train keep_classes=yes", "keep_classes must be teacher, received 'yes'"),
    ("train keep_classes=teacher", "the teacher already has every class of the data set"),
    ("train keep_conf=0.5", "add keep_classes=teacher, or leave keep_conf out"),
    ("train teacher=yolov8s.yaml", "its weights would be random and teach nothing"),
    ("train teacher=yolov8n-p6.yaml random_teacher=true", "levels of stride 8, 16 or 32"),
    ("train teacher=rtdetr-l.yaml random_teacher=true", "it ends in RTDETRDecoder"),
    ("train student={small.pt} teacher={small.pt} student={good.pt}", "key 'student' is given twice"),
    ("train student=no.pt", r"student=no\.pt does not exist"),
    ("train student={segment.pt}", "student=.* is a model for the task 'segment'"),
    ("train student={half.pt}", "student=.* it is cut short"),
    ("train student=yolov9000.yaml", "student=yolov9000.yaml does not exist"),
    ("train student={model_list.yaml}", "model_list.yaml is not a model YAML for a detector"),
    ("train student={model_noparts.yaml}", "needs the lists 'backbone' and 'head'"),
    ("train student={model_row.yaml}", r"a layer must be \[from, repeats, module, arguments\], not \[-1, 1, 'Conv'\]"),
    ("train student={model_many.yaml}", "a layer repeats 1000000000 times; at most 100"),
    ("train student={model_wide.yaml}", r"describes 1,000,\d\d\d,\d\d\d,000 parameters|1,000,001,000,000 parameters"),
    ("train student={model_huge.yaml}", "a layer nn.Linear has an argument above 1,000,000"),
    ("train student={model_width.yaml}", r"a multiple of depth or width must lie in \(0, 10\], not 1000000000"),
    ("train student={model_eval.yaml}", "unsupported activation"),
    ("train student={model_module.yaml}", "'DetectionModel' is no layer that may be used without trust"),
    ("train student={data_bomb.yaml}", "aliases that multiply to more than 200,000 values"),
    ("train student={model_nohead.yaml}", "is not a YOLO detector: it ends in Conv|is not a model YAML for a detector"),
    # ------------------------------------------------------------------------------------------------ data
    ("train data=no.yaml", "data=no.yaml cannot be used: .*does not exist"),
    ("train data={empty_folder}", "data=.*empty_folder cannot be used"),
    ("train data={data_empty.yaml}", "cannot be used"),
    ("train data={data_list.yaml}", "cannot be used"),
    ("train data={data_broken.yaml}", r"is not valid YAML \(line 2"),
    ("train data={data_noval.yaml}", "'val:' key missing"),
    ("train data={data_notrain.yaml}", "'train:' key missing"),
    ("train data={data_gone.yaml}", "images not found"),
    ("train data={data_gone_train.yaml}", "its training images were not found, missing path .*nowhere"),
    ("train data={data_nonames.yaml}", "either 'names' or 'nc' are required"),
    ("train data={data_two.yaml}", "'names' length 3 and 'nc: 2' must match"),
    ("train data={data_nc.yaml}", "'nc: many' must be an integer"),
    ("train data={data_script.yaml}", r"wants to run a script to fetch its images \('download:'\), which yolo-kd"),
    ("train data={data_bash.yaml}", r"wants to run a script to fetch its images \('download:'\), which yolo-kd"),
    ("train data={data_bomb.yaml}", "aliases that multiply to more than 200,000 values"),
    ("train data={data_deep.yaml}", "nested more than 50 deep"),
    ("train data={data_four.yaml}", r"none of the 4 classes of data=.* \(a, b, c, d\) has the name of one of"),
    ("train data={data_channels.yaml}", "teacher=.* takes images of 3 channels, data=.* has 1"),
    ("train data={data_types.yaml}", "'path' must be"),
    ("train data={good.pt}", "cannot be used"),
    # ------------------------------------------------------------------------------------------------ resume
    ("train resume=no.pt", r"resume=no\.pt does not exist"),
    ("train resume=true", "name the checkpoint to continue: resume="),
    ("train resume={empty_folder}", "names no checkpoint"),
    ("train resume={good.pt}", "was not written by a distillation: it names no teacher and no recipe"),
    ("train resume={good.pt} kd=none", "is a finished training"),
    ("train resume={good.pt} student={small.pt}", "student cannot be given with resume"),
    ("train resume={good.pt} kd.objectness.weight=2", "kd.objectness.weight cannot be given with resume"),
    ("train resume={half.pt}", "resume=.* it is cut short"),
    ("train resume={run/weights/plain.pt}", "was not written by a distillation"),
    ("train resume={run/weights/null.pt}", "was not written by a distillation"),
    ("train resume={run/weights/list.pt}", "its training arguments are not"),
    ("train resume={run/weights/elsewhere.pt}", r"belongs to the run folder .*other, but .* add save_dir="),
    ("train resume={run/weights/homeless.pt}", "belongs to the run folder of no name"),
    ("train resume={run/weights/url.pt}", "names the data set 'https://localhost:9/data.yaml', no data YAML of this"),
    ("train resume={run/weights/gone.pt}", "no data YAML of this machine. Add data=<yaml>"),
    ("train resume={run/weights/script.pt}", "wants to run a script to fetch its images"),
    ("train resume={run/weights/giant.pt}", "are not valid here: imgsz=1000000 is not a size that a detector can take"),
    ("train resume={run/weights/device.pt}", "are not valid here: device=99 is not here.* Write device=cpu"),
    ("train resume={run/weights/distill.pt}", "Ultralytics' own distillation"),
    ("train resume={run/weights/epochs.pt}", "its training arguments are not valid here: .*epochs=many"),
    ("train resume={run/weights/plugin.pt}", r"asks to import no_such_module_of_mine.*add plugins=\[no_such_module_of"),
    ("train resume={run/weights/plugin.pt} plugins=no_such_module_of_mine", "cannot be imported"),
    ("train resume={run/weights/recipe.pt}", "unknown loss 'fdg'"),
    ("train resume={run/weights/part.pt}", r"is damaged, or of another revision .*\(wrong: teacher\)"),
    ("train resume={run/weights/kind.pt}", "record of its distillation is damaged"),
    ("train resume={run/weights/text.pt}", r"record of its distillation is damaged, .*\(wrong: it is no mapping\)"),
    ("train resume={run/weights/classes.pt}", "record of its distillation is damaged: its class map"),
    ("train resume={run/weights/renamed.pt}", r"class 0 was 'b' \(of the teacher: a\) and is now 'circle'"),
    ("train resume={run/weights/mapping.pt}", "class_map must be index or a mapping"),
    ("train resume={run/weights/teacher.pt}", "the teacher .*no.pt of this run is gone"),
    ("train resume={run/weights/other.pt}", "is not the file this run began with"),
    ("train resume={run/weights/endless.pt}", "the teacher /dev/zero of this run is gone"),
    ("train resume={run/weights/nested.pt}", "its training arguments are not plain values"),
    # ------------------------------------------------------------------------------------------------ export
    ("export", "no model: add model=<checkpoint>"),
    ("export model=no.pt", r"model=no\.pt does not exist"),
    ("export model={segment.pt}", "is a model for the task 'segment'"),
    ("export model={half.pt}", "model=.* it is cut short"),
    ("export model={model.onnx}", "is an ONNX file, not a checkpoint"),
    ("export model=yolov8n.yaml", "has random weights; export needs a checkpoint"),
    ("export model=3", "model must be the path of a checkpoint, received 3"),
    ("export model={good.pt} format=onx", r"format=onx is not an export format\. Did you mean 'onnx'\?"),
    ("export model={good.pt} formt=onnx", "formt is not an export key"),
    ("export model={good.pt} imgsz=big", "imgsz=big is not a size that a detector can take"),
    ("export model={good.pt} imgsz=0", "imgsz=0 is not a size"),
    ("export model={good.pt} opset=old", "'opset' must be an int"),
    ("export model={good.pt} batch=0", "batch must be a whole number of at least 1, received 0"),
    ("export model={good.pt} images=nowhere", "images=nowhere does not exist"),
    ("export model={good.pt} images={empty_folder}", "holds no picture to compare on"),
    ("export model={good.pt} images={text.pt}", "holds no picture"),
    ("export model={good.pt} images={data_bomb.yaml}", "aliases that multiply to more than 200,000 values"),
    ("export model={good.pt} images={data_types.yaml}", "'path' and 'val' must be text"),
    ("export model={run/weights/giant.pt}", "imgsz=1000000 is not a size that a detector can take"),
    ("export model={good.pt} images=3", "images must be the path of a folder, a picture or a data YAML, received 3"),
    ("export model={good.pt} tolerance_boxes=-1", "tolerance_boxes must be a number of at least 0, received -1"),
    ("export model={good.pt} tolerance_scores=tight", "tolerance_scores must be a number of at least 0"),
    ("export model={good.pt} format=torchscript tolerance_boxes=1", "has no effect with format=torchscript"),
    ("export model={good.pt} trust_checkpoints=yes", "trust_checkpoints must be true or false, received 'yes'"),
    ("export model={good.pt} device=banana", "device=banana is not here"),
    # ------------------------------------------------------------------------------------------- compare and check
    ("compare cfg=nowhere.yaml", "nowhere.yaml: no such file"),
    ("compare arms=baselin,fgd", "unknown arm 'baselin'. Did you mean 'baseline'?"),
    ("compare arms=fgd,fgd", "arm 'fgd' is given 2 times"),
    ("compare arms=", "'arms=' has no value"),
    ("compare arms=nowhere.yaml", "nowhere.yaml: no such file"),
    ("compare arms={kd_list.yaml}", "a comparison needs at least two arms, received .objectness. only"),
    ("compare seeds=0", "seeds must be a whole number of at least 1, received 0"),
    ("compare seeds=two", "seeds must be a whole number of at least 1, received 'two'"),
    ("compare jobs=0", "jobs must be a whole number of at least 1, received 0"),
    ("compare jobs=1.5", "jobs must be a whole number of at least 1"),
    ("compare seed=-1", "seed must be a whole number of at least 0"),
    ("compare armz=baseline", "unknown key 'armz'. Did you mean 'arms'?"),
    ("compare kd=none", "kd=none is the baseline itself"),
    ("compare arms=baseline kd.fgd.weight=2", "kd.fgd.weight"),
    ("compare teacher={good.pt} student={small.pt} data=shapes/data.yaml resume=x.pt", "resume cannot be given to co"),
    ("compare arms=baseline,objectness teacher=nowhere.pt", "teacher=nowhere.pt does not exist"),
    ("check json=maybe", "json must be true or false, received 'maybe'"),
    ("check kd=fdg", "unknown recipe 'fdg'. Did you mean 'fgd'?"),
    ("check epocs=3", "unknown key 'epocs'. Did you mean 'epochs'?"),
    ("check resume=last.pt", "leave out resume"),
    ("check kd=none teacher=none", "nothing to check|teacher"),
    ("check kd={kd_zero.yaml}", "weight"),
    ("check imgsz=big", "imgsz=big is not a size"),
    # -------------------------------------------------------------------------------------------- keys of speed
    ("train teacher_precision=bf61", "teacher_precision must be auto, fp32, bf16 or fp16.*Did you mean 'bf16'"),
    ("train teacher_compile=yes", "teacher_compile must be auto, true or false, received 'yes'"),
    ("train teacher_stream=3", "teacher_stream must be auto, true or false, received 3"),
    ("train teacher_channels_last=no", "teacher_channels_last must be"),
    ("train threads=0", "threads must be auto or a whole number of at least 1, received 0"),
    # -------------------------------------------------------------------------------------------- the pool
    ("train unlabeled=nowhere", "unlabeled=nowhere cannot be used: nowhere does not exist"),
    ("train unlabeled=no/*.jpg", r"unlabeled=no/\*\.jpg cannot be used: no/\*\.jpg matches no file"),
    ("train unlabeled={empty_folder}", "unlabeled=empty_folder holds no image"),
    ("train unlabeled={pool_broken}", r"holds no readable image: 2 cannot be opened \(a.jpg, b.png\)"),
    ("train unlabeled={pool_list.txt}", r"pool_list\.txt names .*nothing\.jpg and 1 more, which does not exist"),
    ("train unlabeled={data_notrain.yaml}", r"data_notrain\.yaml names no images in train:"),
    ("train unlabeled={data_bomb.yaml}", "data_bomb.yaml has aliases that multiply"),
    ("train unlabeled={kd_list.yaml}", "names no images in train:"),
    ("train unlabeled=[{pool_good},nowhere]", "unlabeled=nowhere cannot be used: nowhere does not exist"),
    ("train unlabeled=shapes/images/val", "are the validation images, all 8 of them"),
    ("train unlabeled={pool_good} unlabeled_ratio=-1", "unlabeled_ratio must be a number of at least 0, received -1"),
    ("train unlabeled={pool_good} unlabeled_ratio=many", "unlabeled_ratio must be a number .* received 'many'"),
    ("train unlabeled={pool_good} unlabeled_mode=distil", "unlabeled_mode must be distill, .*Did you mean 'distill'"),
    ("train unlabeled={pool_good} unlabeled_conf=1.5", "unlabeled_conf must be a number between 0 and 1, received 1.5"),
    ("train unlabeled={pool_good} unlabeled_low=0", "unlabeled_low must be a number between 0 and 1, received 0"),
    ("train unlabeled={pool_good} unlabeled_iou=[1]", "unlabeled_iou must be a number between 0 and 1"),
    ("train unlabeled={pool_good} unlabeled_low=0.5", "unlabeled_low=0.5 must lie below unlabeled_conf=0.4"),
    ("train unlabeled_ratio=2", "unlabeled_ratio has no effect without unlabeled: add unlabeled=<a folder, a glob,"),
    ("train unlabeled=3.5", "unlabeled=3.5 cannot be used: 3.5 does not exist"),
    ("train unlabeled={pool_good} kd=none teacher=none", "unlabeled needs a teacher .* kd=none has none"),
    ("train unlabeled={pool_good} batch=1", "batch=1 has no room for a labeled and an unlabeled image"),
    ("train unlabeled={pool_good} rect=true", "rect=True orders images by their shape"),
    ("train data=data_notrain.yaml unlabeled={pool_good} unlabeled_mode=pseudo", "unlabeled_mode=both or distill"),
    ("train data=data_notrain.yaml unlabeled={pool_good} kd.objectness.weight=auto", "follows the task loss, but"),
    ("train data=data_gone_train.yaml unlabeled={pool_good}", "training images were not found, missing path"),
    ("train resume={good.pt} unlabeled_mode=both", "unlabeled_mode cannot be given with resume"),
]  # fmt: skip


def contents(folder: Path) -> dict[str, str]:
    """Return a hash of every file below a folder."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.blake2b(path.read_bytes()).hexdigest() for path in files}


def changes(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Return what the file system notes of every path below a folder; nobody can set the time of its last change."""
    states = ((path, path.lstat()) for path in sorted(folder.rglob("*")))
    return {str(path.relative_to(folder)): (s.st_ino, s.st_size, s.st_ctime_ns) for path, s in states}


def complete(words: list[str]) -> list[str]:
    """Add a good teacher, student and data set to `train` where they are not the point."""
    given = {word.partition("=")[0] for word in words}
    if words[0] not in ("train", "compare", "check") or given & {"resume", "cfg"}:
        return words
    defaults = {
        "teacher": "good.pt",
        "student": "small.pt",
        "data": "shapes/data.yaml",
        "project": f"{os.getcwd()}/out",
        "epochs": "1",
    }
    return words + [f"{key}={value}" for key, value in defaults.items() if not given & {key, f"--{key}"}]


@pytest.fixture(scope="module", autouse=True)
def original(bad_files: Path) -> dict[str, str]:
    return contents(bad_files)


@pytest.mark.parametrize(("command", "message"), BAD, ids=[command[:60] for command, _ in BAD])
def test_bad_input_is_a_sentence(
    command: str,
    message: str,
    bad_files: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(bad_files)
    before = changes(bad_files)
    words = re.sub(r"\{([^{}]+)\}", r"\1", command).split()
    code = main(complete(words))
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2, err
    assert re.search(message, err), err
    assert 1 <= len(lines) <= 3, err
    assert "Traceback" not in err
    assert all(len(line) < 700 for line in lines), err
    assert changes(bad_files) == before


def test_no_file_has_changed(bad_files: Path, original: dict[str, str]) -> None:
    """Stands after the table: content by content, as the file system is believed above."""
    assert contents(bad_files) == original


def test_the_table_is_long_enough() -> None:
    commands = [command for command, _ in BAD]
    assert len(set(commands)) == len(commands) >= 80
