"""data/prepare.py killed at any moment: the old dataset, or the new one, or none and a next call
that puts the new one in place; never a mixture."""

import pytest
from prepare_faults import Scene, kill_at_every_step, prepare, prepare_faults


def test_killed_before_every_change_of_the_file_system(tmp_path, capsys):
    outcomes = list(kill_at_every_step(tmp_path))
    for event, left, finished in outcomes:
        assert finished == "new", event
        assert left in ("old", "none", "new"), event
    # the old one until the first rename of the move, none in it, the new one from its last on
    course = [left for _, left, _ in outcomes]
    assert course == sorted(course, key=["old", "none", "new"].index)
    assert {"old", "none", "new"} == set(course)
    events = [event for event, _, _ in outcomes]
    assert events[course.index("none") - 1] == "os.rename own"


def check(outcomes):
    for outcome in outcomes:
        assert outcome["left"] in ("old", "none", "new") and outcome["finished"] == "new", outcome
        assert outcome["status"] in (0, -9, -15, 143), outcome
        if outcome["status"] == 143:
            assert outcome["error"].splitlines()[-1].startswith("prepare.py: SIGTERM: stopped.")
        elif outcome["status"] == 0:
            assert outcome["left"] == "new", outcome
    assert any(outcome["status"] for outcome in outcomes)


def test_killed_at_random_moments(tmp_path, record_property):
    outcomes = prepare_faults(tmp_path / "scene", moments=4, seed=0)
    check(outcomes)
    left = [outcome["left"] for outcome in outcomes]
    counts = ", ".join(f"{left.count(kind)} {kind}" for kind in ("old", "none", "new"))
    record_property("summary", f"prepare killed at {len(left)} random moments: left {counts}")


def test_a_mixture_would_be_seen(tmp_path):
    """The scene itself: a file of the other dataset is told from both."""
    scene = Scene(tmp_path)
    assert scene.left() == "new"
    for name in scene.old:
        scene.restore()
        assert scene.left() == "old"
        (scene.root / name).write_bytes(scene.new[name])
        assert scene.left() == "mixed"


def test_what_a_killed_call_left_is_removed_though_the_next_one_fails(tmp_path):
    scene = Scene(tmp_path)
    scene.restore()
    (scene.root / "datasets/.own.new").mkdir()
    (scene.root / "datasets/.own.new/fineweb_val_000000.bin").write_bytes(b"half")
    (tmp_path / "docs.jsonl").write_text("{oops\n")
    with pytest.raises(ValueError, match="docs.jsonl, line 1"):
        prepare.main(scene.arguments)
    assert scene.left() == "old"
    assert [path.name for path in (scene.root / "datasets").glob(".*")] == [".own.lock"]


def test_a_completed_dataset_is_moved_in_though_the_next_call_fails(tmp_path, capsys, monkeypatch):
    scene = Scene(tmp_path)
    scene.restore()
    monkeypatch.setattr(prepare.Place, "move_in", lambda place: None)  # killed right before
    scene.make_again()
    assert scene.left() == "old" and (scene.root / "datasets/.own.ready").is_dir()
    monkeypatch.undo()
    (tmp_path / "docs.jsonl").write_text("{oops\n")
    with pytest.raises(ValueError, match="docs.jsonl, line 1"):
        prepare.main(scene.arguments)
    assert scene.left() == "new"
    assert (
        "moving the dataset that an earlier call completed to its place" in capsys.readouterr().out
    )


def test_a_tokenizer_that_cannot_be_written_leaves_the_old_dataset(tmp_path, monkeypatch):
    scene = Scene(tmp_path)
    scene.restore()
    with monkeypatch.context() as patched:

        def full_disk(source, target):
            raise OSError(28, "No space left on device", str(target))

        patched.setattr(prepare.shutil, "copyfile", full_disk)
        with pytest.raises(OSError, match="No space left on device: .*own_400_bpe.model"):
            scene.make_again()
    assert scene.left() == "old"
    assert scene.finished() == "new"
