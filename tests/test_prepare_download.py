"""data/prepare.py: the download, against a hub that is a folder. All else is in test_prepare.py."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from corpus import tokenizer_model
from test_prepare import contents, overlap, prepare


class FakeHub:
    """hf_hub_download of a repository that is a folder; remembers what it was asked for."""

    def __init__(self, folder):
        self.folder, self.asked = folder, []
        (folder / "datasets/tokenizers").mkdir(parents=True)
        (folder / "datasets/tokenizers/official_1024.model").write_bytes(tokenizer_model(1024))
        for split, count in {"val": 2, "train": 3}.items():
            for index in range(count):
                tokens = np.arange(1, 100 * (index + 1))  # one document
                tokens[1:] += split == "train"
                prepare.write_shard(self.shard(split, index), tokens)
        self.write_manifest()

    def shard(self, split, index):
        return self.folder / f"datasets/datasets/fineweb10B_sp1024/fineweb_{split}_{index:06d}.bin"

    def write_manifest(self, variant="sp1024", vocab_size=1024, **stats):
        stats = {"files_val": 2, "files_train": 3, "tokens_val": 99 + 199} | stats
        dataset = {"name": f"fineweb10B_{variant}", "tokenizer_name": "sp_bpe", "stats": stats}
        tokenizer = {
            "name": "sp_bpe",
            "vocab_size": vocab_size,
            "model_path": "tokenizers/official_1024.model",
        }
        manifest = {"version": "10B", "datasets": [dataset], "tokenizers": [tokenizer]}
        (self.folder / "datasets/manifest.json").write_text(json.dumps(manifest))

    def __call__(self, repo_id, filename, *, repo_type, local_dir, force_download=False):
        assert repo_type == "dataset"
        self.repo_id = repo_id
        self.asked.append(Path(filename).name)
        target = Path(local_dir) / filename
        if force_download or not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.folder / filename, target)
        return str(target)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    for variable in ("MATCHED_FINEWEB_REPO_ID", "MATCHED_FINEWEB_REMOTE_ROOT_PREFIX"):
        monkeypatch.delenv(variable, raising=False)
    hub = FakeHub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub)
    return hub


@pytest.fixture
def root(tmp_path):
    return tmp_path / "data"


@pytest.fixture
def folder(root):
    return root / "datasets/fineweb10B_sp1024"


def test_download_fills_the_official_layout(hub, root, folder):
    prepare.main(["--variant", "sp1024", "--train-shards", "2", "--output-root", str(root)])
    shards = [
        hub.shard("val", 0),
        hub.shard("val", 1),
        hub.shard("train", 0),
        hub.shard("train", 1),
    ]
    assert contents(folder) == {shard.name: shard.read_bytes() for shard in shards}
    assert (root / "tokenizers/fineweb_1024_bpe.model").read_bytes() == tokenizer_model(1024)
    assert (
        json.loads((root / "manifest.json").read_text())["downloaded_from"]["repo_id"]
        == prepare.OFFICIAL_REPO
    )
    stats = json.loads((folder / "stats.json").read_text())
    assert stats["val"] == stats["train"] == {"tokens": 298, "shards": 2}
    assert stats["overlap"] == overlap(0, 2)
    assert not (folder / ".download").exists()


def test_download_fetches_only_what_is_missing_or_bad(hub, root, folder):
    prepare.download("sp1024", 2, root)
    expected, hub.asked = contents(folder), []
    (folder / "fineweb_val_000001.bin").unlink()
    truncated = folder / "fineweb_train_000000.bin"
    truncated.write_bytes(truncated.read_bytes()[:-10])
    prepare.download("sp1024", 2, root)
    assert hub.asked == [
        "manifest.json",
        "official_1024.model",
        "fineweb_val_000001.bin",
        "fineweb_train_000000.bin",
    ]
    assert contents(folder) == expected


def test_bad_remote_file_is_named_and_leaves_no_mark(hub, root, folder):
    prepare.download("sp1024", 1, root)
    good = hub.shard("train", 1).read_bytes()
    hub.shard("train", 1).write_bytes(good[:1000])
    message = "sent a bad datasets/.*/fineweb_train_000001.bin: .*found 1000 bytes; expected 1422"
    with pytest.raises(ValueError, match=message):
        prepare.download("sp1024", 2, root)
    assert not (folder / "stats.json").exists()
    assert not (folder / "fineweb_train_000001.bin").exists()
    # the bad copy in the staging folder must not be taken for a download
    hub.shard("train", 1).write_bytes(good)
    prepare.download("sp1024", 2, root)
    assert (folder / "stats.json").exists()
    assert (folder / "fineweb_train_000001.bin").read_bytes() == good


def test_mark_is_absent_while_downloading(hub, root, folder, monkeypatch):
    prepare.download("sp1024", 1, root)

    def connection_lost(**request):
        if "train" in request["filename"]:
            assert not (folder / "stats.json").exists()
            raise ConnectionError("connection lost")
        return hub(**request)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", connection_lost)
    with pytest.raises(ConnectionError):
        prepare.download("sp1024", 2, root)
    assert not (folder / "stats.json").exists()
    assert prepare.verify_shard(folder / "fineweb_train_000000.bin") == 99


def test_stale_local_manifest_is_never_used(hub, root, folder):
    prepare.download("sp1024", 1, root)
    (hub.folder / "datasets/manifest.json").unlink()
    with pytest.raises(FileNotFoundError):
        prepare.download("sp1024", 1, root)
    hub.write_manifest()
    (root / "manifest.json").write_text('{"datasets": "of another repository"}')
    prepare.download("sp1024", 1, root)
    assert (
        json.loads((root / "manifest.json").read_text())["datasets"][0]["name"]
        == "fineweb10B_sp1024"
    )


@pytest.mark.parametrize(
    "manifest, message",
    [
        (
            {"variant": "sp4096"},
            r"has no dataset fineweb10B_sp1024; it has \['fineweb10B_sp4096'\]",
        ),
        ({"vocab_size": 512}, "has no tokenizer sp_bpe of 1024 pieces"),
        ({"files_train": 1}, "--train-shards 2: .* has 1 for sp1024"),
        ({"tokens_val": 300}, "found 298 validation tokens; expected 300"),
    ],
)
def test_manifest_that_does_not_fit_is_refused(hub, root, folder, manifest, message):
    hub.write_manifest(**manifest)
    with pytest.raises(ValueError, match=message):
        prepare.download("sp1024", 2, root)
    assert not (folder / "stats.json").exists()


def test_shards_of_two_repositories_do_not_mix(hub, root, monkeypatch):
    prepare.download("sp1024", 1, root)
    monkeypatch.setenv("MATCHED_FINEWEB_REPO_ID", "somebody/else")
    with pytest.raises(
        ValueError,
        match="holds shards of .*willdepueoai.* delete it to download from .*somebody/else",
    ):
        prepare.download("sp1024", 1, root)
    assert hub.repo_id == "somebody/else"


def test_a_dataset_without_the_overlap_gets_it(hub, root, folder):
    new = prepare.download("sp1024", 2, root)
    old = {key: value for key, value in new.items() if key != "overlap"}
    prepare.write_json(folder / "stats.json", old)
    hub.asked.clear()
    assert prepare.download("sp1024", 2, root) == new
    assert json.loads((folder / "stats.json").read_text()) == new
    assert hub.asked == ["manifest.json", "official_1024.model"]  # the shards are in place


def test_a_repository_that_leaks_is_refused(hub, root, folder):
    prepare.download("sp1024", 2, root)
    shutil.copy(hub.shard("val", 1), hub.shard("train", 2))
    message = (
        "fineweb10B_sp1024: 1 of 2 .* the first in fineweb_train_000002.bin; .*"
        "delete the folder and set MATCHED_FINEWEB_REPO_ID"
    )
    with pytest.raises(ValueError, match=message):
        prepare.download("sp1024", 3, root)
    assert not (folder / "stats.json").exists()
    with pytest.raises(ValueError, match=message):  # a run reads all shards in the folder
        prepare.download("sp1024", 2, root)
    assert not (folder / "stats.json").exists()


def test_remote_root_can_be_overridden(hub, root, folder, monkeypatch):
    (hub.folder / "datasets").rename(hub.folder / "elsewhere")
    monkeypatch.setenv("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", "elsewhere")
    prepare.download("sp1024", 1, root)
    assert (folder / "stats.json").exists()
