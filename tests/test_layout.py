"""LAYOUT: what a text means, and that any other text is refused by name; by systems/layouts.py,
which reads shared mixers and a loop, and by the record, which reads kinds with counts."""

import re
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import Hyperparameters, parse_layout

import train_gpt
from train_gpt import Refused


def own(kinds, first=0):
    """Blocks with mixers of their own."""
    return [(kind, first + i) for i, kind in enumerate(kinds)]


LAYOUTS = {  # (kind, owner) of each block, the order of the passes
    "G": (own("G"), [0]),
    "S A": (own("SA"), [0, 1]),
    "G2": (own("GG"), [0, 1]),
    "  S2   A ": (own("SSA"), [0, 1, 2]),
    "A12": (own(12 * "A"), [*range(12)]),
    "G99": (own(99 * "G"), [*range(99)]),
    "G2 S G2 S=2": ([*own("GGSGG"), ("S", 2)], [*range(6)]),
    "G5 S G5 S=5": ([*own("GGGGGSGGGGG"), ("S", 5)], [*range(12)]),
    "A G A2=0": ([*own("AG"), ("A", 0), ("A", 0)], [*range(4)]),
    "A S2 A2=0": ([*own("ASS"), ("A", 0), ("A", 0)], [*range(5)]),
    "A (G S)x2 A": (own("AGSA"), [0, 1, 2, 1, 2, 3]),
    "(A)x9": (own("A"), [0] * 9),
    "(G S2)x3 G=0": ([*own("GSS"), ("G", 0)], [0, 1, 2, 0, 1, 2, 0, 1, 2, 3]),
    "A2 (A=0 A=1)x2": ([*own("AA"), ("A", 0), ("A", 1)], [0, 1, 2, 3, 2, 3]),
    "A (A)x2 A2": (own("AAAA"), [0, 1, 1, 2, 3]),
    "A3(A3)x3A5": (own(11 * "A"), [0, 1, 2, *3 * [3, 4, 5], 6, 7, 8, 9, 10]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_is_its_blocks_and_passes(layout):
    assert parse_layout(layout) == LAYOUTS[layout]
    assert Hyperparameters.from_env(dict(PRESET="demo", LAYOUT=layout)).layout == layout


BAD = """|   |X|x|B2|g|s|a|G0|G00|G100|G-1|GS|Gg|5G|G=|G~|G~0|G=x|G=0|G S=0|G S=5|G G=1|G G=-1
|G G=0=0|G G=0 G=1|G G~0|G S~0|G G~=0|G G=~0|S S=0 S=1|S=1 S|S G A=0|A S=0|S A=0|G S g=0|S G00
|G999999999|S S=00000|(A)|(A)x|(A)x0|(A)x1|(A)x10|(A)xx2|()x2|( )x2|(A x2|A)x2|((A)x2)x2|(A)x2 (A)x2
|(G)*2|(G)x2 (S)x2|(A))x2|2(A)|(A)3|A, A|A;S|G\x00|G G=0.|Ａ|G²|G٣
|(A)x2 G=5|(G)x2 S=0|None|=0|~|()|(("""


@pytest.mark.parametrize("layout", BAD.replace("\n", "").split("|"))
def test_any_other_text_is_refused_by_name(layout):
    with pytest.raises(ValueError, match="LAYOUT="):
        parse_layout(layout)
    with pytest.raises(ValueError, match="LAYOUT="):
        Hyperparameters.from_env(dict(PRESET="demo", LAYOUT=layout))


def test_an_endless_number_is_refused_by_name():
    with pytest.raises(ValueError, match="LAYOUT="):
        parse_layout("G G=" + "1" * 5000)


def test_a_kind_that_the_system_has_not_is_refused_by_name():
    assert parse_layout("G (A)x2 G=0", "GA") == ([("G", 0), ("A", 1), ("G", 0)], [0, 1, 1, 2])
    for layout in ("S", "G S", "G (S)x2"):
        with pytest.raises(ValueError, match="LAYOUT=.*'S'"):
            parse_layout(layout, "GA")


ANY_TEXT = st.text("GSAgs=~()x01239 ", max_size=14) | st.text(max_size=8)


@settings(max_examples=400, deadline=None)
@given(ANY_TEXT)
def test_any_text_is_a_layout_or_refused_by_name(text):
    try:
        blocks, order = parse_layout(text)
    except ValueError as error:
        assert str(error).startswith("LAYOUT=")
        return
    assert blocks and {*order} == {*range(len(blocks))}
    for i, (kind, owner) in enumerate(blocks):
        assert kind in "GSA" and owner <= i and blocks[owner] == (kind, owner)


@st.composite
def written_layouts(draw):
    """A layout, and what it means, made together."""
    blocks, order, texts = [], [], []
    shapes = (1, 0, 0), (2, 0, 0), (0, 1, 0), (0, 2, 1), (2, 2, 0), (1, 2, 2)
    sizes, loops = draw(st.sampled_from(shapes)), draw(st.integers(2, 9))
    for group, size in enumerate(sizes):
        first, parts = len(blocks), []
        for _ in range(size):
            kind, count = draw(st.sampled_from("GSA")), draw(st.integers(1, 12))
            owners = [i for i, block in enumerate(blocks) if block == (kind, i)]
            owner = draw(st.sampled_from(owners)) if owners and draw(st.booleans()) else None
            blocks += [(kind, len(blocks) + n if owner is None else owner) for n in range(count)]
            number = str(count) if count > 1 or draw(st.booleans()) else ""
            parts.append(kind + number + ("" if owner is None else f"={owner}"))
        if size:
            text = draw(st.sampled_from([" ", "  "])).join(parts)
            texts.append(f"({text})x{loops}" if group == 1 else text)
            order += [*range(first, len(blocks))] * (loops if group == 1 else 1)
    return " ".join(texts), blocks, order


@settings(max_examples=200, deadline=None)
@given(written_layouts())
def test_a_layout_means_what_it_was_written_for(written):
    text, blocks, order = written
    assert parse_layout(text) == (blocks, order)


# ---- the record's, which are plain

PLAIN = {layout: kinds for layout, (kinds, _) in LAYOUTS.items() if not {*"=("} & {*layout}}


def kinds_of(layout: str, hp_class=train_gpt.Hyperparameters) -> str:
    return "".join(hp_class(layout=layout).block_kinds())


@pytest.mark.parametrize("layout", PLAIN)
def test_a_plain_layout_is_its_blocks(layout):
    assert kinds_of(layout) == "".join(kind for kind, _ in PLAIN[layout])
    assert train_gpt.Hyperparameters.from_env(dict(PRESET="demo", LAYOUT=layout)).layout == layout


def test_the_layout_of_the_record_and_of_the_demo():
    assert kinds_of("G3 S G3 S G3 S") == 3 * "GGGS"
    assert train_gpt.Hyperparameters().layout == "G3 S G3 S G3 S"
    assert train_gpt.Hyperparameters.from_env(dict(PRESET="demo")).layout == "G2 S G2 S"


@pytest.mark.parametrize(
    "layout",
    [*sorted(LAYOUTS.keys() - PLAIN.keys()), *BAD.replace("\n", "").split("|"), "G" + "1" * 5000],
)
def test_what_is_not_plain_is_refused_by_name(layout):
    said = f"^LAYOUT={re.escape(repr(layout))}: expected GSA with counts, such as G3 S$"
    with pytest.raises(Refused, match=said):
        kinds_of(layout)
    with pytest.raises(Refused, match=said):
        train_gpt.Hyperparameters.from_env(dict(PRESET="demo", LAYOUT=layout))


def test_kinds_are_those_that_a_class_names():
    class Two(train_gpt.Hyperparameters):
        kinds = "GC"

    assert kinds_of("G2 C3 G", Two) == "GGCCCG"
    for layout in ("S", "G S", "A2"):
        with pytest.raises(Refused, match="^LAYOUT=.*: expected GC with counts"):
            kinds_of(layout, Two)


@settings(max_examples=400, deadline=None)
@given(ANY_TEXT | st.text("GSA0129 ", max_size=12))
def test_any_text_is_plain_or_refused_and_where_it_is_plain_both_agree(text):
    richer = None
    with suppress(Refused):
        richer = parse_layout(text)
    try:
        kinds = kinds_of(text)
    except Refused as error:
        assert str(error).startswith(f"LAYOUT={text!r}: expected GSA with counts")
        assert richer is None or {*"=("} & {*text}
        return
    assert richer == (own(kinds), [*range(len(kinds))])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("GSA"), st.integers(1, 99)), min_size=1, max_size=6))
def test_a_plain_layout_means_what_it_was_written_for(parts):
    text = " ".join(f"{kind}{count}" for kind, count in parts)
    assert kinds_of(text) == "".join(kind * count for kind, count in parts)
