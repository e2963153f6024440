"""What is written is there as a whole or not at all, and nothing of the user's is replaced."""

import os
import signal

import pytest

from dpo_lightning.errors import UserError
from dpo_lightning.storage.atomic import PARTIAL, atomic_file, atomic_folder, foreign

MANIFEST = "manifest.json"


def write(folder, text, **more):
    with atomic_folder(folder, MANIFEST) as partial:
        for name, content in {"a.txt": text, **more}.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            (partial / name).write_text(content)


def names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


@pytest.mark.parametrize("error", [OSError("full"), KeyboardInterrupt(), None])
def test_a_file_is_the_new_or_the_old_one(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old")
    try:
        with atomic_file(path) as partial:
            partial.write_text("new")
            assert path.read_text() == "old"
            if error:
                raise error
    except (OSError, KeyboardInterrupt):
        assert error
    assert path.read_text() == ("old" if error else "new") and names(tmp_path) == ["a.txt"]


def test_a_kill_leaves_the_old_file_and_a_name_that_tells(tmp_path):
    path = tmp_path / "a.ckpt"
    path.write_text("old")
    if not (child := os.fork()):
        with atomic_file(path) as partial:
            partial.write_text("ne")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert path.read_text() == "old"
    assert len(list(tmp_path.glob(f"a.ckpt.????????{PARTIAL}"))) == 1


def test_a_folder_replaces_what_its_manifest_lists(tmp_path):
    folder = tmp_path / "deep" / "folder"
    write(folder, "old", **{"sub/b.txt": "b"})
    assert names(folder) == ["a.txt", MANIFEST, "sub", "sub/b.txt"] and foreign(folder, MANIFEST) is None
    write(folder, "new")
    assert names(folder) == ["a.txt", MANIFEST] and (folder / "a.txt").read_text() == "new"
    assert names(tmp_path / "deep") == ["folder", "folder/a.txt", f"folder/{MANIFEST}"]


@pytest.mark.parametrize("old", [True, False])
def test_a_failure_leaves_a_folder_as_it_was_and_no_parents(tmp_path, old):
    folder = tmp_path / "deep" / "folder"
    if old:
        write(folder, "old")
    before = names(tmp_path)
    with pytest.raises(KeyError), atomic_folder(folder, MANIFEST) as partial:
        (partial / "a.txt").write_text("half")
        raise KeyError
    assert names(tmp_path) == before and (not old or (folder / "a.txt").read_text() == "old")


@pytest.mark.parametrize("name", ["a.txt", "mine.txt"])
def test_what_came_while_it_was_written_stays(tmp_path, name):
    folder = tmp_path / "folder"
    write(folder, "old")
    with pytest.raises(UserError, match=f"folder/{name}' appeared while .* was written: nothing is replaced"):
        with atomic_folder(folder, MANIFEST):
            (folder / name).write_text("mine")
    assert (folder / name).read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("make", ["file", "link", "folder"])
def test_what_is_no_folder_of_ours_is_not_replaced(tmp_path, make):
    folder = tmp_path / "folder"
    if make == "file":
        folder.write_text("mine")
    elif make == "link":
        folder.symlink_to(tmp_path)
    else:
        folder.mkdir()
        (folder / "mine").touch()
    with pytest.raises(UserError, match="nothing is replaced"):
        write(folder, "new")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"] and folder.is_symlink() == (make == "link")


def test_without_a_manifest_nothing_is_replaced(tmp_path):
    for text in ("old", "new"):
        try:
            with atomic_folder(tmp_path / "folder") as partial:
                (partial / "a.txt").write_text(text)
        except OSError:
            assert text == "new"
    assert names(tmp_path) == ["folder", "folder/a.txt"] and (tmp_path / "folder" / "a.txt").read_text() == "old"
