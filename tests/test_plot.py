"""tools/plot.py, page.py and scored.py: what is drawn and written of runs, against loops, the
program's own functions and the tokenizer."""

import json
import math
import re
import shutil
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import brotli
import matplotlib.image
import numpy as np
import pytest
from conftest import ROOT
from corpus import BOS, document_ids, load, tokenizer_model, write_shard
from in_process import planted, train
from test_logs import figures, run
from test_packed import trained
from toys import SYSTEMS

import train_gpt

sys.path.append(str(ROOT / "tools"))
import page  # noqa: E402  (the path comes first)
import plot  # noqa: E402
from dataset import Text  # noqa: E402
from scored import Scored  # noqa: E402

SP = load(tokenizer_model())
HALF = [SP.piece_to_id(f"<0x{byte:02X}>") for byte in (0xE6, 0xA9, 0x41, 0x0D, 0x0A)]
TEXTS = [
    "The <b>quick</b> & \"brown\" fox 'jumps'.",
    "機械 🙂 naïve\ttab",
    "a\x00b\rc\x1bd",
    "",
    "word " * 40,
]


def text_of(folder, ids) -> Text:
    write_shard(folder / "fineweb_val_000000.bin", ids)
    (folder / "tokenizer.model").write_bytes(tokenizer_model())
    return Text(folder, folder / "tokenizer.model")


def written(path, ids, seed=0, **more):
    """A score file of these tokens, of scores at random; bytes: of each token 3, of BOS 0."""
    draw, targets = np.random.default_rng(seed), np.array(ids[1:])
    own = dict(nats=draw.exponential(2, len(targets)).astype(np.float32))
    own |= dict(bytes=3 * (targets != BOS), position=np.arange(1, len(ids)))
    np.savez(path, **(own | more))
    return own | more


@pytest.fixture
def scored(tmp_path):
    """Of documents of which one is empty, one ends in half a character, and one is longer."""
    ids = document_ids(SP, *TEXTS) + [BOS, *HALF, SP.encode("a")[0], *HALF[:2]]
    written(tmp_path / "s.npz", ids)
    return Scored(text_of(tmp_path, ids), tmp_path / "s.npz")


# -----------------------------------------------------------------------------
# scores


def test_bits_by_place_are_those_of_a_loop(scored):
    sums, place = {}, 0
    for target, (bits, size) in enumerate(zip(scored.bits, scored.bytes, strict=True)):
        place = 1 if scored.ids[target] == BOS else place + 1
        first = next(k for k in range(20) if place < 16 << k)
        total = sums.setdefault(first, [0.0, 0])
        total[0], total[1] = total[0] + bits, total[1] + size
    edges, bpb, _ = scored.by_place(scored.bits)
    assert len(sums) > 2 and edges.tolist() == [1, *(16 << k for k in range(len(sums)))]
    np.testing.assert_allclose(bpb, [sums[k][0] / sums[k][1] for k in sorted(sums)])


def test_the_error_is_that_of_a_mean_if_documents_are_alike_in_size(tmp_path):
    ids = 8 * [BOS, *[9] * 12]
    written(tmp_path / "s.npz", ids)
    scored = Scored(text_of(tmp_path, ids), tmp_path / "s.npz")
    scored.bits[scored.bytes == 0] = 0
    each = scored.per_document(scored.bits) / scored.per_document(scored.bytes)
    _, (bpb,), (error,) = scored.by_place(scored.bits)
    assert bpb == pytest.approx(each.mean())
    assert error == pytest.approx(each.std(ddof=1) / math.sqrt(8))


def test_documents_have_all_bits_the_end_of_each_included(scored):
    documents = np.split(scored.ids, np.flatnonzero(scored.ids == BOS))[1:]
    assert scored.lengths.tolist() == [len(x) for x in documents[:-1]] + [len(documents[-1]) - 1]
    first = len(documents[0])
    assert scored.per_document(scored.bits)[0] == pytest.approx(scored.bits[:first].sum())
    assert scored.ids[first] == BOS


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: {**s, "position": s["position"][::-1]}, "not the first of"),
        (lambda s: {name: x[:0] for name, x in s.items()}, "0 targets, not the first of"),
        (lambda s: {**s, "nats": s["nats"] - 99}, "negative or not finite"),
        (lambda s: {**s, "nats": s["nats"] * np.nan}, "negative or not finite"),
        (lambda s: {**s, "bytes": s["bytes"] * 0}, "its bytes are not those of this text"),
        (lambda s: {**s, "bytes": s["bytes"] + 1}, "its bytes are not those of this text"),
        (lambda s: dict(nats=s["nats"]), "not a score file"),
    ],
    ids="order none negative nan zero bos missing".split(),
)
def test_scores_that_are_not_of_this_text(tmp_path, change, message):
    ids = document_ids(SP, *TEXTS)
    np.savez(tmp_path / "s.npz", **change(written(tmp_path / "s.npz", ids)))
    with pytest.raises(ValueError, match=message) as error:
        Scored(text_of(tmp_path, ids), tmp_path / "s.npz")
    assert str(tmp_path / "s.npz") in str(error.value)


# -----------------------------------------------------------------------------
# page


class Reader(HTMLParser):
    """Text of each document, and title and text of each of its tokens; tags must be closed."""

    def __init__(self, source: str):
        super().__init__(convert_charrefs=True)
        self.open, self.documents, self.tokens, self.addresses = [], [], [], []
        self.feed(source.replace("\r\n", "\n").replace("\r", "\n"))  # as browsers do
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        own = dict(attributes)
        self.addresses += [own[name] for name in ("src", "href") if name in own]
        if tag == "meta":
            return
        self.open.append((tag, own))
        if own.get("class") == "text":
            self.documents.append("")
        if tag == "i" and "title" in own:
            self.tokens.append([len(self.documents) - 1, own["title"], ""])

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if any(own.get("class") == "text" for _, own in self.open):
            self.documents[-1] += data
            self.tokens[-1][2] += data


def read_page(scored, tokens=10_000):
    source = page.Page(scored, "<title>", "a & b", tokens).html()
    return source, Reader(source)


def decoded(scored) -> list[str]:
    documents = np.split(scored.ids, np.flatnonzero(scored.ids == BOS))[1:]
    return [SP.decode(document.tolist()).replace("\0", "\u2400") for document in documents]


def test_the_text_of_a_page_is_the_decoded_text(scored):
    source, reader = read_page(scored)
    assert reader.documents == decoded(scored)
    assert "\ufffd\ufffdA\r\na\ufffd\ufffd" == reader.documents[-1]
    assert "<b>quick</b> & \"brown\" fox 'jumps'." in reader.documents[0]
    assert "<title>&lt;title&gt;</title>" in source and "a &amp; b" in source


def test_each_token_says_its_bits(scored):
    """Bits of all parts are those of the document, and byte pieces of a character are one part."""
    _, reader = read_page(scored)
    told = np.zeros(len(scored.starts))
    for document, title, _ in reader.tokens:
        told[document] += float(title.split(" bits")[0])
    expected = scored.per_document(scored.bits)
    assert np.abs(told - expected).max() < 0.005 * max(scored.lengths)
    (title,) = [title for _, title, text in reader.tokens if text == "🙂"]
    pieces = [SP.id_to_piece(token) for token in SP.encode("🙂")]
    assert title.endswith(" \u00b7 " + " ".join(pieces)) and len(pieces) == 4
    assert "\u00b7 12 B \u00b7" in title
    first = int(re.search(r"\u00b7 (\d+)-\d+ \u00b7", title)[1])
    at = scored.starts[1] + first
    assert float(title.split()[0]) == pytest.approx(scored.bits[at - 1 : at + 3].sum(), abs=0.006)


def test_spaces_that_decoding_leaves_out_are_left_out(tmp_path):
    space = SP.piece_to_id("\u2581")
    ids = [BOS, space, space, *SP.encode("a b"), BOS, space, BOS, *SP.encode("x")]
    written(tmp_path / "s.npz", ids)
    scored = Scored(text_of(tmp_path, ids), tmp_path / "s.npz")
    _, reader = read_page(scored)
    assert reader.documents == ["a b", "", "x"] == decoded(scored)


def test_a_page_needs_nothing_from_elsewhere_and_has_a_bound(scored, tmp_path):
    source, reader = read_page(scored)
    assert all(address.startswith("#d") for address in reader.addresses) and reader.addresses
    assert not re.search(r"<script|<link|<img|@import|url\(|https?:", source)
    assert "prefers-color-scheme: dark" in source
    ids = 3 * [BOS, *(SP.encode("機械") * 3000)][:8001]
    written(tmp_path / "l.npz", ids)
    source, reader = read_page(Scored(text_of(tmp_path, ids), tmp_path / "l.npz"), 16_000)
    assert len(reader.documents) == 1 and len(source.encode()) < 1_000_000
    source, reader = read_page(Scored(text_of(tmp_path, ids), tmp_path / "l.npz"), 100)
    assert "the first 100 of the 8,001 tokens of document 1" in source
    assert reader.documents == [SP.decode(ids[:101])]


def test_the_tables_of_a_page(scored):
    """The hardest token stands first, and shares of all bits are those of a loop."""
    source, _ = read_page(scored)
    hardest = source[source.index("Hardest tokens") :]
    place = int(np.argmax(scored.bits))
    assert f'<td class="r">{scored.bits[place]:.1f}</td>' in hardest.split("</tr>")[1]
    totals = {}
    for token, bits in zip(scored.ids[1:].tolist(), scored.bits, strict=True):
        totals[token] = totals.get(token, 0) + bits
    most = max(totals, key=totals.get)
    row = source[source.index("Pieces that cost most") :].split("</tr>")[1]
    assert page.piece(SP, most) in row
    assert f"{totals[most] / scored.bits.sum():.1%}" in row


# -----------------------------------------------------------------------------
# artifact


@pytest.mark.parametrize("name", SYSTEMS)
def test_groups_are_all_bytes_of_the_artifact(tmp_path, lively, name):
    path = tmp_path / "a.ptz"
    _, quantized, _ = trained(path, name, lively)
    raw = path.read_bytes()
    body = brotli.decompress(raw[44:][: int.from_bytes(raw[40:44], "little")])
    groups = plot.groups_of(path, tmp_path / "a.ptz.trained.pt")
    ints = sum(q.numel() for q, _ in quantized.values())
    assert sum(map(len, groups.values())) == len(body) + ints
    assert groups["settings, counts"] == body[: body.index(b"\n") + 1]
    assert groups["embedding, also output"] == quantized["tok_emb.weight"][0].numpy().tobytes()
    scales = b"".join(scale.numpy().tobytes() for _, scale in quantized.values())
    assert groups["scales of rows"] == scales
    mlp = sum(q.numel() for name, (q, _) in quantized.items() if ".mlp." in name)
    assert len(groups["MLP, up"]) + len(groups["MLP, down"]) == mlp
    size = path.stat().st_size
    packed = plot.packed_sizes(groups, size)
    assert sum(packed.values()) == pytest.approx(size) and packed.keys() == groups.keys()


def test_mixers_are_told_apart(tmp_path, lively):
    model, quantized, _ = trained(tmp_path / "a.ptz", "train_gpt", lively)
    groups = plot.groups_of(tmp_path / "a.ptz", tmp_path / "a.ptz.trained.pt")
    sizes = {"Gated DeltaNet": 0, "attention": 0}
    for name, module in model.named_modules():
        kind = {train_gpt.GatedDeltaNet: "Gated DeltaNet", train_gpt.Attention: "attention"}
        if type(module) in kind:
            own = [q for key, (q, _) in quantized.items() if key.startswith(f"{name}.")]
            sizes[kind[type(module)]] += sum(q.numel() for q in own)
    assert {name: len(groups[name]) for name in sizes} == sizes and min(sizes.values()) > 0


# -----------------------------------------------------------------------------
# logs

SETTINGS = dict(
    data_path="./data/x", vocab_size=384, iterations=20000, max_wallclock_seconds=150.0,
    gptq_reserve_seconds=12.0, warmdown_frac=0.75, min_lr=0.1, eval_seq_len=64,
)  # fmt: skip
LINES = [f"  {name}: {value}" for name, value in SETTINGS.items()] + [
    "step:1/20000 train_loss:6.9 train_time:500ms step_avg:500.00ms",
    "step:50/20000 train_loss:4.9 train_time:60000ms step_avg:500.00ms",
    "step:100/20000 train_loss:3.9 train_time:120000ms step_avg:500.00ms",
    "step:115/20000 val_loss:3.95 val_bpb:2.1001 train_time:137900ms step_avg:500.00ms",
    "diagnostic pre-quantization post-ema val_loss:3.9 val_bpb:2.0002 eval_time:5329ms",
    "final_int6_roundtrip val_loss:3.9 val_bpb:2.0103 eval_time:6219ms",
    "final_int6_stream_ttt_lora val_loss:3.4 val_bpb:1.8 eval_time:85524ms",
    "final_int6_stream_ttt_lora_exact val_loss:3.38925292 val_bpb:1.81373015",
]
END = figures(lr_multiplier_at_stop=0.1, val_bpb=1.81373015, step_stop=115)


def shown(path, *lines):
    path.write_text(run(*lines))
    return plot.Shown(path)


def test_what_a_log_says(tmp_path):
    found = shown(tmp_path / "a.txt", *LINES, END)
    assert found.curve("train_loss").tolist() == [[1, 0.5, 6.9], [50, 60, 4.9], [100, 120, 3.9]]
    assert found.curve("val_loss").tolist() == [[115, 137.9, 3.95]]
    assert [bpb for _, bpb in found.stages.values()] == [2.1001, 2.0002, 2.0103, 1.81373015]
    assert [how for how, _ in found.stages.values()][2:] == ["int6", "stream_ttt_lora"]
    assert plot.stage_name("final pass", [found]) == "final pass:\nstream, learning"


def test_the_learning_rate_is_the_programs(tmp_path):
    found = shown(tmp_path / "a.txt", *LINES, END)
    hp = train_gpt.Hyperparameters(
        **{name: SETTINGS[name] for name in plot.SCHEDULE}, warmup_steps=0
    )
    seconds = np.linspace(0, 138, 50)
    expected = [hp.lr_multiplier(hp.progress(0, time)) for time in seconds]
    np.testing.assert_allclose(found.multiplier(0 * seconds, seconds), expected)
    hp.max_wallclock_seconds, hp.iterations = 0.0, 120
    found.settings |= dict(max_wallclock_seconds="0.0", iterations="120")
    steps = np.arange(120)
    expected = [hp.lr_multiplier(hp.progress(step, 9.0)) for step in steps]
    np.testing.assert_allclose(found.multiplier(steps, 9.0 + 0 * steps), expected)
    with pytest.raises(ValueError, match=r"it ended at 0\.1, its settings say 1\.000"):
        found.multiplier(steps[:2], steps[:2])


def test_a_run_that_went_on_has_the_steps_of_both(tmp_path):
    first = run(*LINES[:-5], "step:110/20000 train_loss:9 train_time:1ms step_avg:1ms")
    second = run(*LINES[:8], "resumed: a.pt", *LINES[10:], END)
    (tmp_path / "a.txt").write_text(
        ("\n" + "=" * 100 + "\n").join([run("step:7/9"), first, second])
    )
    found = plot.Shown(tmp_path / "a.txt").curve("train_loss")
    assert found[:, 0].tolist() == [1, 50, 100, 110]
    (tmp_path / "b.txt").write_text(("\n" + "=" * 100 + "\n").join([first, run(*LINES[:9], END)]))
    assert plot.Shown(tmp_path / "b.txt").curve("train_loss")[:, 0].tolist() == [1]


def test_labels_do_not_meet():
    values = [2.0, 2.01, 2.02, 3.0, 1.0]
    placed = plot.apart(values, 0.1)
    assert np.argsort(placed).tolist() == np.argsort(values).tolist()
    assert np.diff(sorted(placed)).min() >= 0.1 - 1e-6
    assert placed[3:] == [3.0, 1.0]


@pytest.mark.parametrize(
    "value, text",
    [(0, "0 B"), (999, "999 B"), (8316, "8.3 kB"), (9950, "10 kB"), (647_941, "648 kB"),
     (999_499, "999 kB"), (999_500, "1.00 MB"), (16_000_000, "16.00 MB")],
)  # fmt: skip
def test_bytes_in_words(value, text):
    assert plot.in_bytes(value) == text


# -----------------------------------------------------------------------------
# all of it, of a real run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of the program: log, artifact, sample, state, score file."""
    folder = tmp_path_factory.mktemp("run")
    script = planted(folder, "train_gpt")
    train(folder, script, ttt="lora", eval_mode="stream", iterations=12, train_log_every=4)
    return folder


@pytest.fixture
def folder(finished, monkeypatch):
    monkeypatch.chdir(finished)
    shutil.rmtree("plots", ignore_errors=True)
    return finished


ALL = {f"run.{name}.{kind}" for name in "training stages place artifact learning".split()
       for kind in ("png", "svg")} | {"run.html"}  # fmt: skip


def drawn(*args) -> int | str:
    return plot.main(["--output", "plots", *map(str, args)])


def test_all_of_a_run_is_drawn_and_can_be_read(folder, capsys):
    assert drawn("logs/run.txt") == 0
    out, err = capsys.readouterr()
    assert out.count("\n") == 1 and out.startswith("plot: plots/run.*: training.png, .svg; ")
    assert err == ""
    files = {path.name: path for path in (folder / "plots").iterdir()}
    assert files.keys() == ALL
    for name, path in files.items():
        if name.endswith(".png"):
            height, width, _ = matplotlib.image.imread(path).shape
            assert width == 1600 and 600 < height < 1400
        if name.endswith(".svg"):
            assert ET.parse(path).getroot().tag == "{http://www.w3.org/2000/svg}svg"
            text = path.read_text("utf-8")
            assert "own text: data" in text and "run run" in text and "dc:date" not in text
            assert len(text) < 60_000
    told = json.loads((folder / "logs" / "run.txt").read_text().rpartition("figures: ")[2])
    stages = files["run.stages.svg"].read_text()
    for name in ("raw_val_bpb", "pre_quant_val_bpb", "val_bpb"):
        assert f"{told[name]:.4f}" in stages
    assert f"{told['val_bpb']:.4f} bits per byte" in files["run.html"].read_text()


def test_the_same_run_gives_the_same_files(folder):
    draw = plot.pictures([plot.Shown(Path("logs/run.txt"))], plot.parse(["logs/run.txt"]), [])
    with matplotlib.rc_context(plot.STYLE):
        for name in ("a", "b"):
            plot.save(draw["place"](), folder / name)
    for kind in ("png", "svg"):
        assert (folder / f"a.{kind}").read_bytes() == (folder / f"b.{kind}").read_bytes()


def test_what_is_of_another_run_is_left_out(folder, capsys):
    """And what an earlier call drew of it is removed."""
    (folder / "plots").mkdir()
    for name in ALL:
        (folder / "plots" / name).touch()
    log = (folder / "logs" / "run.txt").read_text()
    digest = re.search(r'"artifact_sha256": "(\w+)"', log)[1]
    (folder / "other").mkdir(exist_ok=True)
    (folder / "other" / "run.txt").write_text(log.replace(digest, "0" * 64))
    capsys.readouterr()
    assert drawn("other/run.txt") == 0
    left = capsys.readouterr().err
    due = f"artifact {digest[:12]}, that of other/run.txt is 000000000000"
    assert f"plot: left out: artifact: model.ptz: {due}\n" in left
    assert f"plot: left out: learning: model.ptz.sample.npz: {due}\n" in left
    names = {path.name for path in (folder / "plots").iterdir()}
    assert names == {name for name in ALL if not re.search("artifact|learning", name)}
    changed = re.sub(r'"val_bpb": [\d.]+', '"val_bpb": 1.5', log)
    (folder / "other" / "run.txt").write_text(changed)
    files = plot.Files(plot.Shown(Path("other/run.txt")), plot.parse(["other/run.txt"]))
    with pytest.raises(ValueError, match=r"scores\.npz: \d\.\d+ bits per byte, .*: 1\.5"):
        _ = files.scored


def test_runs_on_one_picture(folder):
    log = (folder / "logs" / "run.txt").read_text()
    (folder / "other").mkdir(exist_ok=True)
    (folder / "other" / "small.txt").write_text(
        re.sub("  data_path: .*", "  data_path: elsewhere", log)
    )
    assert drawn("logs/run.txt", "other/small.txt") == 0
    names = {path.name for path in (folder / "plots").iterdir()}
    assert names == {f"run+small.{name}.{kind}" for name in ("training", "stages", "place")
                     for kind in ("png", "svg")}  # fmt: skip
    text = (folder / "plots" / "run+small.stages.svg").read_text()
    assert "several texts" in text and "own text: elsewhere" in text
    assert re.search(r">small \d\.\d{4}<", text) and re.search(r">run \d\.\d{4}<", text)


def test_a_log_without_figures_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text(run("  seed: 1"))
    assert drawn("a.txt") == "plot: error: nothing could be drawn"
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 6 and all(line.startswith("plot: left out: ") for line in lines)
    assert "plot: left out: training: no train_loss in a.txt" in lines
    assert "plot: left out: artifact: a.txt names no artifact: give --artifact" in lines
    assert list((tmp_path / "plots").iterdir()) == []


@pytest.mark.parametrize(
    "content, message",
    [(None, "No such file"), ("", "empty, expected the log of a run"), ("x", "no log of a run")],
)
def test_what_is_no_log_is_one_line(tmp_path, content, message):
    if content is not None:
        (tmp_path / "a.txt").write_text(content)
    error = plot.main([str(tmp_path / "a.txt"), "--output", str(tmp_path)])
    assert error.startswith("plot: error: ") and message in error and "\n" not in error


def test_what_cannot_be_asked_for(tmp_path, capsys):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.txt").write_text(run(*LINES, END))
    paths = [str(tmp_path / folder / "x.txt") for folder in ("a", "b")]
    assert plot.main(paths) == f"plot: error: two logs have one name: {', '.join(paths)}"
    for args in ([*paths, "--scores", "s.npz"], [paths[0], "--tokens", "0"]):
        with pytest.raises(SystemExit):
            plot.main(args)
    assert "s.npz: of one run, 2 logs are given" in capsys.readouterr().err
