"""data/prepare.py: the download, from a hub that is a server in this process. All else is in
test_prepare.py."""

import errno
import hashlib
import json
import shutil
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx2
import huggingface_hub
import numpy as np
import pytest
from corpus import tokenizer_model
from test_prepare import contents, description, everything, overlap, prepare

TOKENIZER = "official_1024.model"


class Hub:
    """A repository that is a folder, served as the hub does; remembers which files it sent.

    faults, by name of the file: an HTTP status instead of the file; "zeros" or "html" instead of
    its content; "cut", a connection that closes in the middle of it; or a function to call before.
    """

    def __init__(self, folder):
        self.folder, self.asked, self.faults = folder, [], {}
        self.checksum = "sha256"  # or "git" or "none"
        self.repos = set()
        (folder / "datasets/tokenizers").mkdir(parents=True)
        (folder / "datasets/tokenizers" / TOKENIZER).write_bytes(tokenizer_model(1024))
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
            "model_path": f"tokenizers/{TOKENIZER}",
        }
        manifest = {"version": "10B", "datasets": [dataset], "tokenizers": [tokenizer]}
        (self.folder / "datasets/manifest.json").write_text(json.dumps(manifest))

    def etag(self, data):
        if self.checksum == "git":
            return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        return hashlib.sha256(data).hexdigest() if self.checksum == "sha256" else "of-a-mirror"

    def answer(self, request):
        """(status, headers, body) of /datasets/<owner>/<repo>/resolve/main/<path>."""
        repo, _, path = request.path.partition("/resolve/main/")
        self.repos.add(repo.removeprefix("/datasets/"))
        path = self.folder / path
        fault = self.faults.get(path.name)
        if isinstance(fault, int):
            return fault, {"Content-Length": 0}, b""
        if not path.is_file():
            headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": "a" * 40}
            return 404, headers | {"Content-Length": 0}, b""
        data = body = path.read_bytes()
        headers = {"X-Repo-Commit": "a" * 40, "ETag": f'"{self.etag(data)}"'}
        headers |= {"X-Linked-Size": len(data), "Content-Length": len(data)}
        if request.command == "GET":
            self.asked.append(path.name)
            if callable(fault):
                fault()
        if fault == "html":
            headers, body = {"Content-Length": 6}, b"<html>"
        if fault == "zeros":
            body = data[:-50] + bytes(50)
        return 200, headers, body[:50] if fault == "cut" else body


def serve(hub):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, *_):
            pass

        def do_GET(self):
            status, headers, body = hub.answer(self)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, str(value))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)
                self.close_connection = len(body) < int(headers["Content-Length"])

        do_HEAD = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    return server


def point_at(monkeypatch, address):
    """As HF_ENDPOINT=address, which the library reads once, when it is imported."""
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def waits(monkeypatch):
    """Seconds that were waited, which nobody waits here."""
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    return waits


@pytest.fixture
def hub(tmp_path, monkeypatch, waits):
    for variable in ("MATCHED_FINEWEB_REPO_ID", "MATCHED_FINEWEB_REMOTE_ROOT_PREFIX"):
        monkeypatch.delenv(variable, raising=False)
    hub = Hub(tmp_path / "hub")
    server = serve(hub)
    address = f"http://127.0.0.1:{server.server_port}"
    point_at(monkeypatch, address)
    yield hub
    server.shutdown()
    server.server_close()


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
    assert stats["files"] == description(folder) and len(stats["files"]) == 4
    assert stats["tokenizer_sha256"] == hashlib.sha256(tokenizer_model(1024)).hexdigest()
    assert stats["verified"] is True
    assert sorted(path.name for path in root.rglob(".*")) == [".fineweb10B_sp1024.lock"]


def test_download_fetches_only_what_is_missing_or_bad(hub, root, folder):
    prepare.download("sp1024", 2, root)
    expected, hub.asked = contents(folder), []
    (folder / "fineweb_val_000001.bin").unlink()
    truncated = folder / "fineweb_train_000000.bin"
    truncated.write_bytes(truncated.read_bytes()[:-10])
    overwritten = folder / "fineweb_train_000001.bin"  # and of the right size
    overwritten.write_bytes(overwritten.read_bytes()[:-10] + bytes(10))
    prepare.download("sp1024", 2, root)
    assert hub.asked == [
        "manifest.json",
        "official_1024.model",
        "fineweb_val_000001.bin",
        "fineweb_train_000000.bin",
        "fineweb_train_000001.bin",
    ]
    assert contents(folder) == expected


def without_arrivals(root):
    """What a user has, without what is on its way."""
    return {name: data for name, data in everything(root).items() if ".download" not in name}


def fits(folder):
    """True if stats.json describes what is in the folder."""
    return json.loads((folder / "stats.json").read_text())["files"] == description(folder)


def test_bad_remote_file_is_named_and_the_old_dataset_stays(hub, root, folder):
    prepare.download("sp1024", 1, root)
    before = contents(folder), (folder / "stats.json").read_bytes()
    good = hub.shard("train", 1).read_bytes()
    hub.shard("train", 1).write_bytes(good[:1000])
    message = "sent a bad datasets/.*/fineweb_train_000001.bin: .*found 1000 bytes; expected 1422"
    with pytest.raises(ValueError, match=message):
        prepare.download("sp1024", 2, root)
    assert (contents(folder), (folder / "stats.json").read_bytes()) == before
    # the bad copy in the staging folder must not be taken for a download
    hub.shard("train", 1).write_bytes(good)
    prepare.download("sp1024", 2, root)
    assert fits(folder)
    assert (folder / "fineweb_train_000001.bin").read_bytes() == good


def test_the_old_dataset_is_whole_while_downloading(hub, root, folder):
    prepare.download("sp1024", 1, root)
    before = contents(folder), (folder / "stats.json").read_bytes()
    seen = []

    def look():
        seen.append((contents(folder), (folder / "stats.json").read_bytes()))

    hub.faults = {"fineweb_train_000001.bin": look, "fineweb_train_000002.bin": 503}
    with pytest.raises(OSError, match="HTTP 503"):
        prepare.download("sp1024", 3, root)
    hub.faults = {"fineweb_train_000001.bin": look, "fineweb_train_000002.bin": look}
    prepare.download("sp1024", 3, root)
    assert seen == [before] * len(seen) and len(seen) == 2
    assert fits(folder) and len(contents(folder)) == 5


def test_a_new_dataset_appears_at_once(hub, root, folder):
    def look():
        assert not folder.exists()
        seen.append(1)

    seen = []
    hub.faults = dict.fromkeys((f"fineweb_train_00000{i}.bin" for i in range(3)), look)
    prepare.download("sp1024", 3, root)
    assert len(seen) == 3 and fits(folder)


def test_what_has_arrived_is_kept(hub, root, folder):
    hub.faults = {"fineweb_train_000001.bin": "zeros"}
    with pytest.raises(ValueError, match="sent a bad .*000001.bin: found checksum"):
        prepare.download("sp1024", 2, root)
    assert not folder.exists()
    hub.asked, hub.faults = [], {}
    prepare.download("sp1024", 2, root)
    assert hub.asked == ["manifest.json", TOKENIZER, "fineweb_train_000001.bin"]
    assert fits(folder) and len(contents(folder)) == 4


def test_fewer_shards_than_there_are_keeps_all(hub, root, folder, capsys):
    new = prepare.download("sp1024", 3, root)
    capsys.readouterr()
    assert prepare.download("sp1024", 1, root) == new
    assert fits(folder) and len(contents(folder)) == 5
    assert "training shards up to fineweb_train_000002.bin: all are kept" in capsys.readouterr().out


def test_a_gap_is_filled(hub, root, folder):
    prepare.download("sp1024", 3, root)
    (folder / "fineweb_train_000001.bin").unlink()
    prepare.download("sp1024", 1, root)
    assert fits(folder) and len(contents(folder)) == 5


def test_a_shard_that_the_hub_does_not_have_is_refused(hub, root, folder):
    prepare.download("sp1024", 3, root)
    before = everything(root)
    hub.write_manifest(files_train=2)
    with pytest.raises(ValueError, match="has no fineweb_train_000002.bin: move it away"):
        prepare.download("sp1024", 2, root)
    assert without_arrivals(root) == before


def test_shards_of_the_competitions_own_download_are_taken_over(hub, root, folder):
    folder.mkdir(parents=True)
    for split in ("train", "val"):
        shutil.copy(hub.shard(split, 0), folder)
    damaged = folder / "fineweb_val_000000.bin"
    damaged.write_bytes(damaged.read_bytes()[:-2] + b"\7\7")
    (folder / "notes.txt").write_text("mine")
    prepare.download("sp1024", 1, root)
    assert hub.asked[2:] == ["fineweb_val_000000.bin", "fineweb_val_000001.bin"]
    assert fits(folder) and (folder / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("checksum, verified", [("git", True), ("sha256", True), ("none", False)])
def test_checksums_of_the_hub(hub, root, folder, checksum, verified):
    hub.checksum = checksum
    assert prepare.download("sp1024", 1, root)["verified"] is verified
    assert fits(folder)
    hub.faults = {"fineweb_train_000001.bin": "zeros"}
    if verified:
        with pytest.raises(ValueError, match="found checksum [0-9a-f]+; expected"):
            prepare.download("sp1024", 2, root)
    else:
        assert prepare.download("sp1024", 2, root)["verified"] is False


def test_without_a_checksum_of_the_hub_the_folders_own_counts(hub, root, folder):
    hub.checksum = "none"
    prepare.download("sp1024", 1, root)
    path = folder / "fineweb_train_000000.bin"
    good = path.read_bytes()
    path.write_bytes(good[:-2] + b"\7\7")
    hub.asked.clear()
    prepare.download("sp1024", 1, root)
    assert hub.asked[2:] == ["fineweb_train_000000.bin"] and path.read_bytes() == good


@pytest.mark.parametrize(
    "fault, message",
    [
        (429, "HTTP 429 Too Many Requests: wait some minutes and call again"),
        (503, "HTTP 503 Service Unavailable: call again later; what has arrived is kept"),
        (500, "HTTP 500 Internal Server Error: call again later"),
        (401, "HTTP 401 Unauthorized: .* set HF_TOKEN"),
        (403, "HTTP 403 Forbidden: .* set HF_TOKEN"),
        (404, "HTTP 404 Not Found: check MATCHED_FINEWEB_REPO_ID"),
        ("zeros", "found checksum [0-9a-f]{64}; expected [0-9a-f]{64}, says the hub; call again"),
        ("cut", r"(peer closed|incomplete|Consistency check).*what has arrived is kept"),
        ("html", r"(X-Repo-Commit|proxy).*what has arrived is kept"),
    ],
)
@pytest.mark.parametrize("file", ["manifest.json", TOKENIZER, "fineweb_train_000001.bin"])
def test_what_the_hub_says_is_told(hub, root, folder, waits, file, fault, message):
    prepare.download("sp1024", 1, root)
    before = everything(root)
    hub.faults = {file: fault}
    with pytest.raises((OSError, ValueError), match=f"parameter-golf.*{file}.*{message}"):
        prepare.download("sp1024", 2, root)
    assert without_arrivals(root) == before
    assert len(waits) >= 5 or fault not in (429, 503)  # the library asks again
    hub.faults = {}
    prepare.download("sp1024", 2, root)
    assert fits(folder)


def test_no_hub_at_all(hub, root, monkeypatch):
    point_at(monkeypatch, "http://127.0.0.1:9")
    with pytest.raises(OSError, match="manifest.json: .*refused: check network, proxy"):
        prepare.download("sp1024", 1, root)


@pytest.mark.parametrize(
    "error, message",
    [
        (httpx2.ReadTimeout("The read operation timed out"), "timed out: check network"),
        (httpx2.ConnectTimeout(""), "ConnectTimeout: check network"),
        (RuntimeError("Data processing error: CAS service error"), "CAS service error: check"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device: free some"),
    ],
)
def test_what_the_library_raises_is_told(hub, root, folder, monkeypatch, error, message):
    prepare.download("sp1024", 1, root)

    def failing(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", failing)
    with pytest.raises(prepare.HubError, match=f"manifest.json: .*{message}"):
        prepare.download("sp1024", 2, root)
    assert fits(folder)


def test_the_space_is_looked_for_before_the_first_shard(hub, root, monkeypatch):
    usage = shutil.disk_usage(root.parent)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    found = r"the missing shards need about 0\.\d MB, and 0\.0 MB are free"
    with pytest.raises(ValueError, match=found):
        prepare.download("sp1024", 1, root)
    assert hub.asked == ["manifest.json", TOKENIZER]


def test_file_systems_without_links(hub, root, folder, monkeypatch):
    def no_links(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(prepare.os, "link", no_links)
    prepare.download("sp1024", 1, root)
    prepare.download("sp1024", 2, root)
    assert fits(folder) and len(contents(folder)) == 4


def test_two_calls_at_a_time_are_refused(hub, root, folder):
    def second_call():
        with pytest.raises(ValueError, match="another prepare.py is at work on it"):
            prepare.download("sp1024", 1, root)
        refused.append(1)

    refused = []
    hub.faults = {"fineweb_train_000000.bin": second_call}
    prepare.download("sp1024", 1, root)
    assert refused == [1] and fits(folder)


def test_own_text_of_that_name_is_not_replaced(hub, root, folder, tmp_path):
    prepare.write_shard(folder / "fineweb_train_000000.bin", np.arange(5))
    prepare.write_json(folder / "stats.json", {"name": "own"})
    before = everything(root)
    with pytest.raises(ValueError, match="holds shards of own text; delete it to download"):
        prepare.download("sp1024", 1, root)
    assert without_arrivals(root) == before


def test_a_download_is_not_replaced_by_own_text(hub, root, folder, tmp_path):
    prepare.download("sp1024", 1, root)
    before = everything(root)
    (tmp_path / "docs.jsonl").write_text('{"text": "a b"}\n' * 2)
    command = ["--docs", str(tmp_path / "docs.jsonl"), "--num-val-docs", "1", "--vocab-size", "300"]
    command += ["--name", folder.name, "--output-root", str(root)]
    with pytest.raises(ValueError, match="holds shards of .*willdepueoai.*: delete it, or give"):
        prepare.main(command)
    (folder / "stats.json").unlink()
    with pytest.raises(ValueError, match="without a stats.json .*: delete it, or give"):
        prepare.main(command)
    prepare.download("sp1024", 1, root)
    assert everything(root) == before


def test_the_tokenizer_of_another_dataset_is_not_replaced(hub, root, folder):
    model = root / "tokenizers/fineweb_1024_bpe.model"
    model.parent.mkdir(parents=True)
    model.write_bytes(b"another one")
    other = root / "datasets/fineweb/stats.json"
    used = {"tokenizer": str(model), "tokenizer_sha256": hashlib.sha256(b"another one").hexdigest()}
    prepare.write_json(other, used)
    with pytest.raises(ValueError, match="the dataset fineweb was made with it"):
        prepare.download("sp1024", 1, root)
    assert model.read_bytes() == b"another one" and not folder.exists()
    prepare.write_json(other, used | {"tokenizer_sha256": "of an older file"})
    prepare.download("sp1024", 1, root)
    assert model.read_bytes() == tokenizer_model(1024)


@pytest.mark.parametrize(
    "manifest, message",
    [
        ("<html>", "manifest.json is no JSON object; found b'<html>'"),
        ("[]", "manifest.json is no JSON object"),
        ('{"datasets": 3}', "has no readable entry"),
        ('{"datasets": [{"name": "fineweb10B_sp1024"}]}', "has no readable entry 'tokenizer_name'"),
    ],
)
def test_a_manifest_that_is_none(hub, root, manifest, message):
    (hub.folder / "datasets/manifest.json").write_text(manifest)
    with pytest.raises(ValueError, match=message):
        prepare.download("sp1024", 1, root)


def test_shards_of_two_repositories_do_not_mix_on_their_way(hub, root, folder, monkeypatch):
    hub.faults = {"fineweb_train_000001.bin": "zeros"}
    with pytest.raises(ValueError, match="found checksum"):
        prepare.download("sp1024", 2, root)
    monkeypatch.setenv("MATCHED_FINEWEB_REPO_ID", "somebody/else")
    hub.faults = {}
    with pytest.raises(ValueError, match="download holds shards of .*willdepueoai.* delete it"):
        prepare.download("sp1024", 2, root)
    assert not folder.exists()


def test_stale_local_manifest_is_never_used(hub, root, folder):
    prepare.download("sp1024", 1, root)
    (hub.folder / "datasets/manifest.json").unlink()
    with pytest.raises(OSError, match="manifest.json: HTTP 404"):
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
        ({"files_val": 0}, "says {.*'files_val': 0"),
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
    assert "somebody/else" in hub.repos


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
    assert fits(folder) and len(contents(folder)) == 4
    shutil.copy(hub.shard("train", 2), folder)
    with pytest.raises(ValueError, match=message):  # a run reads all shards in the folder
        prepare.download("sp1024", 2, root)
    assert not fits(folder)


def test_remote_root_can_be_overridden(hub, root, folder, monkeypatch):
    (hub.folder / "datasets").rename(hub.folder / "elsewhere")
    monkeypatch.setenv("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", "elsewhere")
    prepare.download("sp1024", 1, root)
    assert (folder / "stats.json").exists()
