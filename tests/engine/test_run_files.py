"""Files are whole or absent, and damage is found before anything is loaded."""

from __future__ import annotations

import errno
import os
import pickle
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from yolo_kd.engine import run_files as saving
from yolo_kd.engine.epoch_position import POSITION
from yolo_kd.errors import CheckpointError


@pytest.fixture
def last(tmp_path: Path) -> Path:
    path = tmp_path / "weights" / "last.pt"
    path.parent.mkdir()
    torch.save({"epoch": 1, "weights": torch.arange(1000.0)}, path)
    return path


def names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


@pytest.mark.parametrize("links", [True, False], ids=["hard links", "no hard links"])
def test_a_file_is_replaced_and_its_predecessor_kept(last: Path, links: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not links:

        def unsupported(*_: Any) -> None:
            raise OSError(errno.EPERM, "not permitted")

        monkeypatch.setattr(os, "link", unsupported)
    before = last.read_bytes()
    previous = saving.previous_of(last)
    saving.write_atomically(last, b"second", keep=previous)
    saving.write_atomically(last, b"third", keep=previous)
    assert (last.read_bytes(), previous.read_bytes()) == (b"third", b"second")
    assert names(last.parent) == {"last.pt", "last.prev.pt"}
    assert before != b"third"


def test_old_or_new_stands_there_at_every_step(last: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call to the system is a moment at which a kill may come: look at both files before each of them."""
    first = last.read_bytes()
    previous = saving.previous_of(last)
    saving.write_atomically(last, b"second", keep=previous)
    seen: list[tuple[str, bytes, bytes]] = []

    def watched(name: str) -> Any:
        call = getattr(os, name)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            seen.append((name, last.read_bytes(), previous.read_bytes()))
            return call(*args, **kwargs)

        return wrapper

    for name in ("fsync", "link", "replace"):
        monkeypatch.setattr(os, name, watched(name))
    saving.write_atomically(last, b"third", keep=previous)
    calls = [name for name, *_ in seen]
    assert calls == ["fsync", "link", "replace", "replace", "fsync"]  # content, predecessor, place, folder
    assert {now for _, now, _ in seen} == {b"second", b"third"}
    assert {before for *_, before in seen} == {first, b"second"}


@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
def test_a_full_disk_leaves_what_was_there(last: Path, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = last.read_bytes()

    def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(*((Path, "write_bytes") if step == "write" else (os, step)), full)
    with pytest.raises(OSError, match="No space left") as caught:
        saving.write_atomically(last, b"new", keep=saving.previous_of(last) if step != "replace" else None)
    monkeypatch.undo()
    assert last.read_bytes() == before
    assert "last.pt.partial" not in names(last.parent)
    assert caught.value.filename == str(last)
    said = saving.unwritable(caught.value, last, alone=True)
    assert said is not None
    assert said.exit_code == 1
    assert str(said).startswith(f"{last} could not be written (No space left on device, ")
    assert str(said).endswith(f"continue with yolo-kd train kd=none resume={last}")


def test_other_errors_are_not_explained_away(last: Path) -> None:
    assert saving.unwritable(FileNotFoundError(errno.ENOENT, "no such file"), last, alone=False) is None


def test_a_path_with_spaces_can_be_pasted() -> None:
    assert saving.resume_command(Path("my runs/last.pt"), alone=False) == "yolo-kd train 'resume=my runs/last.pt'"


def test_writes_of_ultralytics_are_recorded(tmp_path: Path) -> None:
    trainer = SimpleNamespace(wdir=tmp_path / "w", last=tmp_path / "w" / "last.pt", best=tmp_path / "w" / "best.pt")
    paths = dict(vars(trainer))
    with saving.recorded(trainer) as files:
        trainer.wdir.mkdir(parents=True, exist_ok=True)
        trainer.last.write_bytes(b"a")
        trainer.best.write_bytes(b"b")
        (trainer.wdir / "epoch3.pt").write_bytes(b"c")
    assert files == {"last.pt": b"a", "best.pt": b"b", "epoch3.pt": b"c"}
    assert vars(trainer) == paths
    assert not (tmp_path / "w").exists()


def test_an_entry_is_added_and_nothing_else_changes(last: Path) -> None:
    data = saving.with_entry(last.read_bytes(), POSITION, {"batches": 3})
    last.write_bytes(data)
    state = torch.load(last, weights_only=True)
    assert state.pop(POSITION) == {"batches": 3}
    assert state["epoch"] == 1
    assert torch.equal(state["weights"], torch.arange(1000.0))


# ------------------------------------------------------------------------------------------------ damage


def test_a_whole_file_has_no_damage(last: Path) -> None:
    assert saving.damage(last) == ""


def test_every_flipped_bit_of_the_content_is_found(last: Path) -> None:
    """Also where torch loads the file without a word, with a wrong weight."""
    whole = last.read_bytes()
    with zipfile.ZipFile(last) as archive:
        entries = [e for e in archive.infolist() if e.file_size]
    silent = 0
    for entry in entries:
        name = len(entry.filename.encode())
        start = entry.header_offset + 30
        start += name + int.from_bytes(whole[start - 2 : start], "little")
        for offset in range(start, start + entry.file_size, max(entry.file_size // 25, 1)):
            data = bytearray(whole)
            data[offset] ^= 0x10
            last.write_bytes(data)
            assert saving.damage(last), f"byte {offset} of {entry.filename}"
            try:
                torch.load(last, weights_only=True)
                silent += 1
            except Exception:
                continue
    assert silent > 20


@pytest.mark.parametrize("part", [0, 1, 4, 100, 1000, -1, -22, -200])
def test_every_cut_is_found(last: Path, part: int) -> None:
    last.write_bytes(last.read_bytes()[:part])
    assert saving.damage(last)


def test_a_pickle_that_stops_in_the_middle_is_found(last: Path) -> None:
    with zipfile.ZipFile(last, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"a": list(range(100))})[:-20])
    assert saving.damage(last)


def test_looking_for_damage_runs_nothing(last: Path) -> None:
    """A pickle that would write a file is read through, not loaded; judging it is the restricted loader's work."""
    marker = last.with_name("marker")

    class Evil:
        def __reduce__(self) -> tuple:
            return os.system, (f"touch {marker}",)

    torch.save({"evil": Evil()}, last)
    assert saving.damage(last) == ""
    assert not marker.exists()


def test_a_bomb_is_not_unpacked(last: Path) -> None:
    with zipfile.ZipFile(last, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("archive/data/0", "w") as part:
        for _ in range(200):
            part.write(bytes(1 << 20))
    assert saving.damage(last) == ""  # not torch's own kind of file: left to the loader, which has limits


# ------------------------------------------------------------------------------------------------ falling back


def test_the_checkpoint_itself_where_it_is_whole(last: Path) -> None:
    assert saving.usable(last) == last


def test_the_predecessor_where_it_is_not(last: Path) -> None:
    previous = saving.previous_of(last)
    whole = last.read_bytes()
    saving.write_atomically(last, whole[:500], keep=previous)
    assert saving.usable(last) == previous
    said = saving.restore(last)
    assert last.read_bytes() == previous.read_bytes() == whole
    assert last.with_name("last.damaged.pt").read_bytes() == whole[:500]
    assert said.startswith(f"{last} is damaged (it is cut short or overwritten")
    assert names(last.parent) == {"last.pt", "last.prev.pt", "last.damaged.pt"}


def test_neither(last: Path) -> None:
    data = bytearray(last.read_bytes())
    data[data.find(b"weights")] ^= 1
    last.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"the checksum .* is wrong. Its predecessor last.prev.pt does not exist"):
        saving.usable(last)
    saving.previous_of(last).touch()
    with pytest.raises(CheckpointError, match=r"last.prev.pt cannot be read either: it is empty"):
        saving.usable(last)


def test_a_run_without_any_checkpoint(last: Path) -> None:
    last.unlink()
    assert saving.usable(last) == last  # nobody's run: the loader says that the file does not exist
    (last.parent.parent / "args.yaml").touch()
    with pytest.raises(CheckpointError, match="ended before its first checkpoint"):
        saving.usable(last)
