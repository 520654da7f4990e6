"""The code blocks of README and docs, and a folder in which their commands run as written, on tiny data and models.

Nothing is substituted by name: the folder holds small files under the names that the documentation uses. Only what
costs time is replaced in a command: epochs, image size, batch, seeds (see `TINY` and `SMALL_SCRIPTS`).
"""

from __future__ import annotations

import re
import shlex
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from tests.conftest import ROOT, load_script
from tests.support.models import narrow_checkpoint, narrow_yaml

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<reason>.*?) -->\n)?^```(?P<language>\w*)[^\n]*\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
NAMED = re.compile(r"# (\w+\.(?:yaml|py))\n")

TINY = {
    "epochs": "1",
    "imgsz": "64",
    "batch": "4",
    "workers": "0",
    "plots": "False",
    "amp": "False",
    "cache": "False",
    "device": "cpu",
}
TINY_COMPARE = {**TINY, "seeds": "1", "jobs": "1"}
SMALL_SCRIPTS = {  # the last of two equal arguments counts
    "make_shapes.py": "--train 4 --val 2 --imgsz 64",
    "bench_step.py": "--imgsz 64 --batch 2 --rounds 1 --recipes objectness",
    "measure_strength.py": "--steps 1 --measure 1 --settings 64x4 --losses at",
    "agreement.py": "--imgsz 64 --conf 0.0001",
    "few_labels.py": "--seeds 1 --jobs 1 --arms few both@2",
}
SMALL_KEYS = ("epochs=1", "imgsz=64", "batch=8", "workers=0")


@dataclass(frozen=True)
class Block:
    """A fenced code block.

    Attributes:
        page: Its page, relative to the repository.
        number: Which block of the page it is, from 1.
        language: bash, python, yaml, text, or nothing.
        text: Its content.
        reason: Why it is not run, None where it is.
        section: Start of its section in the page.
    """

    page: str
    number: int
    language: str
    text: str
    reason: str | None
    section: int

    def __str__(self) -> str:
        return f"{self.page}:{self.number}"


def blocks() -> list[Block]:
    """Return every fenced code block of README, CONTRIBUTING and docs."""
    found = []
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        for number, match in enumerate(BLOCK.finditer(text), 1):
            section = text.rfind("\n## ", 0, match.start())
            page = str(path.relative_to(ROOT))
            found.append(Block(page, number, match["language"], match["text"], match["reason"], section))
    return found


def files_for(block: Block) -> dict[str, str]:
    """Return the files that a block's page shows, by name; the block's own section comes first."""
    named = [
        (other, match[1])
        for other in blocks()
        if other.page == block.page and (match := NAMED.match(other.text)) is not None
    ]
    named.sort(key=lambda item: item[0].section == block.section)
    return {name: other.text for other, name in named}


def commands(text: str) -> list[list[str]]:
    """Return the commands of a block, word by word; comments are left out and continued lines are joined."""
    lines = text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def shrunk(words: list[str]) -> list[str]:
    """Return a command that does the same in seconds."""
    if words[:1] == ["yolo-kd"] and words[1] in ("train", "check", "compare"):
        tiny = TINY_COMPARE if words[1] == "compare" else TINY
        kept = [word for word in words if word.partition("=")[0] not in tiny]
        resumed = any(word.startswith("resume=") for word in words)
        return kept + ([] if resumed else [f"{key}={value}" for key, value in tiny.items()])
    if words[:1] == ["yolo-kd"] and words[1] == "export":
        return [*words, "imgsz=64"]
    if words[:1] == ["python"] and Path(words[1]).name in SMALL_SCRIPTS:
        before, dashes, after = words[: words.index("--")] if "--" in words else words, "--" in words, []
        if dashes:
            after = [
                w for w in words[words.index("--") + 1 :] if w.partition("=")[0] not in ("epochs", "imgsz", "batch")
            ]
            after = ["--", *(w for w in after if not w.startswith(("amp=", "workers="))), *SMALL_KEYS]
        return [*before, *shlex.split(SMALL_SCRIPTS[Path(words[1]).name]), *after]
    if words[:1] == ["python"] and Path(words[1]).name == "train_upstream.py":
        return [*(w for w in words if w.partition("=")[0] not in TINY), *(f"{k}={v}" for k, v in TINY.items())]
    return words


# ------------------------------------------------------------------------------------------------ the folder


def make_workspace(folder: Path) -> Path:
    """Fill a folder with tiny files under the names that the documentation uses."""
    for name in ("cfg", "scripts"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "docs").mkdir()
    drawn = load_script("make_shapes").make_shapes(folder / "drawn", train=8, val=4, test=4, imgsz=64, seed=0).parent
    data_set(drawn, folder / "my.yaml", ["car", "truck", "dog"])
    data_set(drawn, folder / "coco8.yaml", ["car", "truck", "dog"])
    data_set(drawn, folder / "road.yaml", ["vehicle", "person", "dog"])
    data_set(drawn, folder / "raccoon.yaml", ["raccoon", "person of straw", "stone"])
    shutil.copytree(drawn / "images" / "test", folder / "path" / "to" / "images")
    names = dict(enumerate(coco_names()))
    narrow_checkpoint("yolov8n", folder, nc=80, names=names, seed=1, file="yolov8n.pt")
    narrow_checkpoint("yolov8n", folder, width=0.25, nc=80, names=names, seed=2, file="yolov8s.pt", sure=True)
    for family in ("yolov8", "yolo11"):
        narrow = yaml.safe_load(narrow_yaml(f"{family}n", folder / "narrow").read_text())
        narrow["scales"] = {"n": [0.33, 0.125, 1024], "s": [0.33, 0.25, 1024], "l": [0.33, 0.25, 1024]}
        (folder / f"{family}.yaml").write_text(yaml.safe_dump(narrow))
    teachers = {"bccd_teacher": ["RBC", "WBC", "Platelets"], "raccoon_teacher": ["raccoon"]}
    teachers["teacher"] = ["car", "truck", "dog"]
    for name, classes in teachers.items():
        weights = folder / "runs" / "detect" / name / "weights"
        weights.mkdir(parents=True)
        keys = {"names": dict(enumerate(classes)), "file": "best.pt", "sure": True}
        narrow_checkpoint("yolov8n", weights, width=0.25, nc=len(classes), **keys)
    for name, family in (("yolo11_teacher", "yolo11n"),):
        weights = folder / "runs" / "detect" / name / "weights"
        weights.mkdir(parents=True)
        names = {0: "RBC", 1: "WBC", 2: "Platelets"}
        narrow_checkpoint(family, weights, width=0.25, names=names, file="best.pt", sure=True)
    shutil.copytree(folder / "runs/detect/teacher", folder / "runs/demo/teacher")
    shutil.copytree(drawn, folder / "runs/demo/data")
    for name in ("bccd", "raccoon"):
        source = fake_source(name, folder / "sources" / name)
        module = load_script("get_data")
        module.convert(module.SOURCES[name], source, folder / "runs" / "data" / name)
    return folder


def coco_names() -> list[str]:
    """Return COCO's class names, as Ultralytics lists them."""
    from ultralytics.utils import ROOT as PACKAGE

    described = yaml.safe_load((PACKAGE / "cfg" / "datasets" / "coco8.yaml").read_text(encoding="utf-8"))
    return list(described["names"].values())


def data_set(drawn: Path, file: Path, names: list[str]) -> None:
    """Write a data YAML of the drawn images with other class names."""
    folder = file.with_name(f"{file.stem}_data")
    shutil.copytree(drawn, folder)
    splits = {split: f"images/{split}" for split in ("train", "val", "test")}
    file.write_text(yaml.safe_dump({"path": str(folder), **splits, "names": dict(enumerate(names))}))


def fake_source(name: str, root: Path) -> Path:
    """Write a small copy of a public repository: its layout, Pascal VOC annotations, drawn pictures."""
    import cv2

    source = load_script("get_data").SOURCES[name]
    rng = np.random.default_rng(0)
    listed = (ROOT / "cfg" / "experiments" / "bccd_20_percent.txt").read_text().split()
    stems = {"bccd": [*listed, *(f"more_{i}" for i in range(7))], "raccoon": [f"raccoon-{i}" for i in range(8)]}[name]
    splits = {"train": stems, "val": [f"val_{i}" for i in range(3)], "test": [f"test_{i}" for i in range(3)]}
    for split, listing in source.splits.items():
        (root / source.annotations).mkdir(parents=True, exist_ok=True)
        (root / source.images).mkdir(parents=True, exist_ok=True)
        for stem in splits[split]:
            picture = rng.integers(0, 255, (60, 80, 3), dtype=np.uint8)
            cv2.imwrite(str(root / source.images / f"{stem}.jpg"), picture)
            (root / source.annotations / f"{stem}.xml").write_text(voc(source.names))
        path = root / listing
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".csv":
            rows = [f"{stem}.jpg,80,60,{source.names[0]},8,6,40,30" for stem in splits[split]]
            path.write_text("\n".join(["filename,width,height,class,xmin,ymin,xmax,ymax", *rows]) + "\n")
        else:
            path.write_text("".join(f"{stem}\n" for stem in splits[split]))
    return root


def voc(names: tuple[str, ...]) -> str:
    """Return an annotation of an image of 80 x 60 pixels: a box, one that leaves the image, and one without area."""
    boxes = [(8, 6, 40, 30), (60, 40, 90, 70), (10, 10, 10, 20)]
    objects = "".join(
        f"<object><name>{names[i % len(names)]}</name><bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax>"
        f"<ymax>{y2}</ymax></bndbox></object>"
        for i, (x1, y1, x2, y2) in enumerate(boxes)
    )
    return f"<annotation><size><width>80</width><height>60</height><depth>3</depth></size>{objects}</annotation>"


def zipped(root: Path, file: Path) -> Path:
    """Pack a source as GitHub packs an archive: everything in one folder."""
    with zipfile.ZipFile(file, "w") as archive:
        for path in sorted(p for p in root.rglob("*") if p.is_file()):
            archive.write(path, Path("repository-0123abc") / path.relative_to(root))
    return file
