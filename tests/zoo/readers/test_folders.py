from pathlib import Path

from sane_ray.zoo.readers.folders import walk


def test_sorted_parents_first_hidden_folders_and_pruned_ones_left_out(tmp_path: Path):
    for name in ("b/inner", "a", ".git", "big"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "z.txt").touch()
    (tmp_path / "y.txt").touch()
    visited = []
    for folder, names, files in walk(tmp_path):
        visited.append((folder.relative_to(tmp_path).as_posix(), files))
        names[:] = [name for name in names if name != "big"]
    assert visited == [(".", ["y.txt", "z.txt"]), ("a", []), ("b", []), ("b/inner", [])]


def test_links_are_followed_and_a_circle_of_links_ends(tmp_path: Path):
    (tmp_path / "root").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "root" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "root")
    (tmp_path / "root" / "twice").symlink_to(tmp_path / "elsewhere")
    assert [folder.name for folder, _, _ in walk(tmp_path / "root")] == ["root", "linked"]


def test_a_link_upwards_does_not_lead_out_of_the_zoo(tmp_path: Path):
    (tmp_path / "root").mkdir()
    (tmp_path / "sibling").mkdir()
    (tmp_path / "root" / "up").symlink_to("..")
    assert [folder.name for folder, _, _ in walk(tmp_path / "root")] == ["root"]
