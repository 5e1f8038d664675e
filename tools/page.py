"""A scored text as one HTML page: each token coloured by its bits. plot.py writes it.

It needs nothing from elsewhere: no script, no font, no picture. The text of a document's element is
its decoded text, but for NUL, which HTML cannot hold: U+2400 stands for it.
"""

import html
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))  # not there with PYTHONSAFEPATH
from dataset import BOS  # noqa: E402  (the path comes first)
from scored import Scored  # noqa: E402

EDGES = (0.5, 1, 2, 4, 8, 12)  # bits of a token, between the colours
COMMON = 20  # a piece that is there so often has a mean
STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1c1c1c; --faint: #63666a; --rule: #d5d7da }
@media (prefers-color-scheme: dark) {
  :root { --page: #16181a; --ink: #e8e8e8; --faint: #a0a4a8; --rule: #3a3d40 } }
body { background: var(--page); color: var(--ink); font: 16px/1.6 system-ui, sans-serif;
  max-width: 52rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin: 2.5rem 0 .5rem }
p, td, th { font-variant-numeric: tabular-nums } .faint, caption, th { color: var(--faint) }
a { color: inherit }
table { border-collapse: collapse; margin: 1rem 0; font-size: .9rem }
caption { text-align: left; padding-bottom: .3rem; white-space: nowrap }
th { font-weight: normal; text-align: left } td, th { padding: .1rem 1rem .1rem 0 }
td { border-top: 1px solid var(--rule); vertical-align: top } td.r, th.r { text-align: right }
code { white-space: pre-wrap; overflow-wrap: anywhere }
.text { white-space: pre-wrap; overflow-wrap: anywhere; border-left: 2px solid var(--rule);
  padding-left: 1rem }
.text i, .legend i { font-style: normal; border-radius: 3px } .legend i { padding: .15rem .5rem }
.legend { position: sticky; top: 0; background: var(--page); padding: .3rem 0 }
h2 { scroll-margin-top: 3.5rem }
.text i:hover { outline: 2px solid #0072b2 }
.n::before { content: "\\21b5"; opacity: .5 }
.e::after { content: "\\25a0"; opacity: .5 }
"""


class Part(NamedTuple):
    """Tokens first to end - 1 of a document, and their text: together a character or more."""

    first: int
    end: int
    text: str


# --------------------------------------------------------------------------------------------------
# Text


def characters(raw: bytes, at: int) -> Iterator[Part]:
    """Of byte pieces in a row, the first is token `at`: each character, or byte that is of none."""
    for character in raw.decode("utf-8", "surrogateescape"):
        is_half = "\udc80" <= character <= "\udcff"
        size = 1 if is_half else len(character.encode())
        yield Part(at, at + size, "\ufffd" if is_half else character)
        at += size


def surface(sp, token: int) -> str:
    """The text of a piece that is no byte."""
    if sp.is_control(token) or sp.is_unknown(token):
        return sp.decode([token])
    return sp.id_to_piece(token).replace("\u2581", " ")


def split(sp, ids: list[int]) -> list[Part]:
    """A document, which starts with BOS, in parts that join to its decoded text. Raises: ValueError
    if the tokenizer decodes it in another way."""
    parts, run = [], []
    for at, token in enumerate([*ids, BOS]):
        if sp.is_byte(token):
            run.append(int(sp.id_to_piece(token)[3:5], 16))  # <0xE6>
            continue
        parts += characters(bytes(run), at - len(run))
        parts.append(Part(at, at + 1, surface(sp, token)))
        run = []
    return cut_to(parts[1:-1], sp.decode(ids))  # without both BOS


def cut_to(parts: list[Part], text: str) -> list[Part]:
    """Without the spaces before a document's text, which decoding leaves out."""
    surplus = len("".join(part.text for part in parts)) - len(text)
    found = []
    for part in parts:
        cut = min(max(surplus, 0), len(part.text) - len(part.text.lstrip(" ")))
        surplus -= cut
        found.append(part._replace(text=part.text[cut:]))
    if "".join(part.text for part in found) != text:
        raise ValueError(f"the pieces are not the decoded text, {ascii(text[:40])}")
    return found


def escape(text: str) -> str:
    """For an element or an attribute. A parser would make LF of CR."""
    return html.escape(text.replace("\0", "\u2400")).replace("\r", "&#13;")


def piece(sp, token: int) -> str:
    return escape(sp.id_to_piece(int(token)))


def level(bits: float) -> int:
    return int(np.searchsorted(EDGES, bits, side="right"))


def number(value: float, digits: int = 0) -> str:
    return f"{value:,.{digits}f}"


# --------------------------------------------------------------------------------------------------
# Page


class Page:
    def __init__(self, scored: Scored, title: str, about: str, tokens: int):
        """title, about: of run and text, plain; tokens: so many are shown at most, whole documents
        or the start of the first."""
        self.scored, self.title, self.about = scored, title, about
        ends = np.cumsum(scored.lengths)
        self.shown = max(1, int((ends <= tokens).sum()))  # documents
        self.most = tokens

    def html(self) -> str:
        body = [self.head(), self.legend(), self.documents(), *self.pieces(), self.hardest()]
        body += [self.document(number) for number in range(self.shown)]
        lines = "\n".join(body)
        return (
            '<!DOCTYPE html>\n<html lang="en">\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width">\n'
            f"<title>{escape(self.title)}</title>\n<style>{STYLE}{colours()}</style>\n"
            f"<body>\n{lines}\n</body>\n</html>\n"
        )

    def head(self) -> str:
        s = self.scored
        figures = (
            f"{number(len(s.starts))} documents, {number(len(s.bits))} tokens, "
            f"{number(s.bytes.sum())} bytes, {number(s.bits.sum())} bits: "
            f"<b>{s.bpb:.4f} bits per byte</b>"
        )
        shown = f"Shown: {self.what_is_shown()}. Tables: all of them."
        return (
            f"<h1>{escape(self.title)}</h1>\n<p>{escape(self.about)}</p>\n<p>{figures}</p>\n"
            f'<p class="faint"><a href="#d1">The text</a> is below the tables. {shown} '
            "Hover over a token: bits, bytes, place in its document, piece. "
            "\u25a0 is the end of a document, which costs bits, too.</p>"
        )

    def what_is_shown(self) -> str:
        documents, first = len(self.scored.starts), int(self.scored.lengths[0])
        if self.shown < 2 and first > self.most:
            return f"the first {number(self.most)} of the {number(first)} tokens of document 1"
        return f"the first {number(self.shown)} of {number(documents)} documents"

    def legend(self) -> str:
        names = [f"{a:g} to {b:g}" for a, b in zip(EDGES, EDGES[1:], strict=False)]
        names = [f"less than {EDGES[0]:g}", *names, f"{EDGES[-1]:g} bits or more"]
        swatches = (f'<i class="b{i}">{name}</i>' for i, name in enumerate(names))
        return f'<p class="legend">Bits of a token: {" ".join(swatches)}</p>'

    def documents(self) -> str:
        s = self.scored
        bits, sizes = s.per_document(s.bits), s.per_document(s.bytes)
        bpb = np.divide(bits, sizes, out=np.full(len(bits), np.nan), where=sizes > 0)
        order = [i for i in np.argsort(bpb, kind="stable") if sizes[i]]
        few = order if len(order) <= 10 else order[:5] + order[-5:]
        rows = [
            (self.link(i), number(sizes[i]), number(bits[i]), f"{bpb[i]:.3f}", self.start_of(i))
            for i in few
        ]
        caption = "Documents, from the easiest to the hardest"
        caption += ": the first and last five" if len(few) < len(order) else ""
        return table(caption, "document,bytes,bits,bits per byte,starts with".split(","), rows)

    def link(self, i: int) -> str:
        return f'<a href="#d{i + 1}">{i + 1}</a>' if i < self.shown else f"{i + 1}"

    def start_of(self, i: int) -> str:
        start = int(self.scored.starts[i])
        end = min(start + 24, start + int(self.scored.lengths[i]))
        text = " ".join(self.scored.sp.decode(self.scored.ids[start:end].tolist()).split())
        return f"<code>{escape(text[:48])}</code>"

    def pieces(self) -> Iterator[str]:
        """What costs most in all, and the pieces with the highest and the lowest mean."""
        s, V = self.scored, self.scored.sp.vocab_size()
        targets = s.ids[1:].astype(int)
        count, total = np.bincount(targets, minlength=V), np.bincount(targets, s.bits, V)
        mean = total / np.maximum(count, 1)

        def rows(ids) -> list:
            columns = count[ids].tolist(), mean[ids], total[ids] / max(s.bits.sum(), 1e-9)
            names = [f"<code>{piece(s.sp, i)}</code>" for i in ids]
            cells = zip(names, *columns, strict=True)
            return [(name, number(n), f"{x:.2f}", f"{share:.1%}") for name, n, x, share in cells]

        heads = "piece,times,bits each,of all bits".split(",")
        most = np.argsort(-total, kind="stable")[:8]
        yield table("Pieces that cost most in all", heads, rows(most[count[most] > 0]))
        common = np.flatnonzero(count >= COMMON)
        if len(common):
            order = common[np.argsort(mean[common], kind="stable")]
            there = f"of those that are there {COMMON} times or more"
            yield table(f"Easiest pieces, {there}", heads, rows(order[:8]))
            yield table(f"Hardest pieces, {there}", heads, rows(order[::-1][:8]))

    def hardest(self) -> str:
        s, rows = self.scored, []
        for i in np.argsort(-s.bits, kind="stable")[:12]:
            document, place = int(s.document[i]), int(s.place[i])
            before = s.sp.decode(s.ids[max(int(s.starts[document]), i - 15) : i + 1].tolist())
            text = f"<code>{escape(before[-40:])}</code>"
            token = f"<code>{piece(s.sp, s.ids[i + 1])}</code>"
            rows.append((token, f"{s.bits[i]:.1f}", self.link(document), number(place), text))
        heads = "token,bits,document,place,behind".split(",")
        return table("Hardest tokens", heads, rows)

    def document(self, i: int) -> str:
        s, start = self.scored, int(self.scored.starts[i])
        length = int(s.lengths[i])
        bits, size = s.bits[start : start + length].sum(), s.bytes[start : start + length].sum()
        figures = f"{number(size)} bytes, {number(bits)} bits"
        figures += f", {bits / size:.3f} bits per byte" if size else ""
        shown = min(length, self.most)
        ids = s.ids[start : start + shown + 1].tolist()
        is_whole = ids[-1] == BOS and len(ids) > 1
        body = "".join(self.marked(start, part) for part in split(s.sp, ids[: len(ids) - is_whole]))
        body += self.end(start + len(ids) - 1) if is_whole else ""
        return (
            f'<h2 id="d{i + 1}">Document {i + 1}</h2>\n<p class="faint">{figures}</p>\n'
            f'<div class="text" dir="auto">{body}</div>'
        )

    def marked(self, start: int, part: Part) -> str:
        """start: of the document in the text."""
        s, first, end = self.scored, start + part.first - 1, start + part.end - 1  # targets
        bits, size = float(s.bits[first:end].sum()), int(s.bytes[first:end].sum())
        tokens = " ".join(piece(s.sp, token) for token in s.ids[first + 1 : end + 1])
        place = str(part.first) + f"-{part.end - 1}" * (part.end - part.first > 1)
        kind = f"b{level(bits)}" + " n" * (part.text == "\n")
        title = f"{bits:.2f} bits \u00b7 {size} B \u00b7 {place} \u00b7 {tokens}"
        quoted = f'"{kind}"' if " " in kind else kind
        return f'<i class={quoted} title="{title}">{escape(part.text)}</i>'

    def end(self, at: int) -> str:
        bits = float(self.scored.bits[at - 1])
        return f'<i class="e b{level(bits)}" title="{bits:.2f} bits \u00b7 end of document"></i>'


def colours() -> str:
    """One hue, thicker with more bits, on a light page and on a dark one."""
    shares = (0, 0.1, 0.2, 0.32, 0.45, 0.6, 0.75)
    return "".join(
        f".b{i} {{ background: rgb(213 94 0 / {share:g}) }}\n" for i, share in enumerate(shares)
    )


def table(caption: str, heads: list[str], rows: list) -> str:
    """rows: of HTML. A column of figures stands right."""

    def is_figure(cell: str) -> bool:
        return not cell.startswith("<code>")

    numeric = [all(is_figure(cell) for cell in column) for column in zip(*rows, strict=True)]
    numeric = numeric or [False] * len(heads)

    def line(cells, tag: str) -> str:
        marks = (' class="r"' * right for right in numeric)
        cells = (f"<{tag}{mark}>{cell}</{tag}>" for cell, mark in zip(cells, marks, strict=True))
        return f"<tr>{''.join(cells)}</tr>"

    lines = [line(heads, "th"), *(line(row, "td") for row in rows)]
    return f"<table>\n<caption>{caption}</caption>\n" + "\n".join(lines) + "\n</table>"
