"""Hyperparameters of the record and of every system against the strings in the environment."""

import json
import math
import re
from dataclasses import fields
from pathlib import Path

import baseline
import crawler
import gdn_hybrid
import hybrid_1895
import kv_share
import pure_gdn
import pytest
import transformer

import train_gpt
from train_gpt import Hyperparameters

ROOT = Path(__file__).resolve().parent.parent
MODULES = baseline, crawler, gdn_hybrid, hybrid_1895, kv_share, pure_gdn, transformer
SYSTEMS = {"record": Hyperparameters} | {m.__name__: m.Hyperparameters for m in MODULES}
FIELDS = [(system, f.name) for system, cls in SYSTEMS.items() for f in fields(cls)]

# a value of each type that no field has
OTHER = {bool: "1", int: "7", float: "0.015625", str: "some text"}
VALID = {  # fields for which that value is impossible, or their own
    "preset": "demo",
    "scores": "scores.npz",
    "layout": "A3 S",
    "xsa": "0",
    "eval_mode": "sliding",
    "ttt": "",
    "vocab_size": "60000",
    "model_dim": "96",
    "gdn_heads": "24",
    "gdn_key_heads": "1",
    "num_heads": "12",
    "num_kv_heads": "2",
    "head_dim": "48",
    "rope_dims": "32",
    "mlp_mult": "2.25",
    "rope_base": "500.5",
    "logit_softcap": "15.5",
    "rounding_step": "0.125",
    "eval_seq_len": "99",
    "max_wallclock_seconds": "99.5",
    "embed_bits": "5",
    "loop_bits": "5",
    "attn_out_bits": "5",
    "frequent_bits": "5",
    "frequent": "0f" * 1024,
    "conv_size": "3",
}
OWN_VALID = {  # the same of one system
    "baseline": dict(eval_mode="stream", ttt="lora", head_dim="96", xsa="1"),
    "kv_share": dict(layout="G4", eval_mode="stream"),
    "crawler": dict(layout="A (A G)x2 A", ttt="lora"),
    "pure_gdn": dict(
        ttt="lora", train_seq_len="2048", train_batch_tokens="393216", curriculum="0:2x64"
    ),
    "transformer": dict(layout="A4 (A2)x2 A5"),
    "gdn_hybrid": dict(ttt="lora", xsa="1", head_dim="96"),
    "hybrid_1895": dict(
        layout="A4 (G2)x2 A5",
        head_dim="32",
        rope_dims="8",
        train_seq_len="2048",
        o_norm="1",
    ),
}
PRESETS = sorted(tuple(path.name.split(".")[:2]) for path in (ROOT / "presets").glob("*.json"))
NEEDS = {  # what else must change with it
    ("record", "eval_mode"): dict(TTT=""),
    ("transformer", "eval_mode"): dict(TTT=""),
    ("baseline", "ttt"): dict(EVAL_MODE="stream"),
    ("pure_gdn", "grad_accum_steps"): dict(TRAIN_BATCH_TOKENS="7168"),
}


def test_every_system_has_a_demo():
    assert {(system, "demo") for system in SYSTEMS} <= set(PRESETS)


def text_of(value) -> str:
    return str(int(value) if isinstance(value, bool) else value)


# -----------------------------------------------------------------------------
# presets and the environment


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_record_is_the_defaults(system):
    cls = SYSTEMS[system]
    hp = cls.from_env({})
    assert hp.preset == "record" and hp.system == system
    for field in fields(cls):
        if field.name != "run_id":
            assert getattr(hp, field.name) == getattr(cls(), field.name)
    assert hp.run_id != cls.from_env({}).run_id
    assert cls.from_env(dict(RUN_ID="x")) == cls.from_env(dict(RUN_ID="x", PRESET="record"))


@pytest.mark.parametrize("system, preset", PRESETS)
def test_a_preset_is_a_diff_of_the_defaults_under_the_environment(system, preset):
    cls = SYSTEMS[system]
    hp, default = cls.from_env(dict(PRESET=preset)), cls()
    changes = json.loads((ROOT / f"presets/{system}.{preset}.json").read_text())
    assert changes.keys() <= {field.name for field in fields(cls)}
    for field in fields(cls):
        if field.name not in ("preset", "run_id"):
            value = getattr(hp, field.name)
            assert value == changes.get(field.name, getattr(default, field.name))
            assert type(value) is field.type
    assert hp.preset == preset
    assert cls.from_env(dict(PRESET=preset, SEED="5")).seed == 5
    back = {name.upper(): text_of(getattr(default, name)) for name in changes}
    hp = cls.from_env(dict(PRESET=preset) | back)  # the environment wins
    assert all(getattr(hp, name) == getattr(default, name) for name in changes)


@pytest.mark.parametrize("system, name", FIELDS)
def test_every_field_is_read_from_its_variable(system, name):
    cls = SYSTEMS[system]
    field = next(field for field in fields(cls) if field.name == name)
    text = OWN_VALID.get(system, {}).get(name, VALID.get(name, OTHER[field.type]))
    also = NEEDS.get((system, name), {})
    hp = cls.from_env({name.upper(): text} | also)
    value = getattr(hp, name)
    assert type(value) is field.type
    assert value == (text == "1" if field.type is bool else field.type(text))
    assert value != getattr(cls(), name)
    if name != "preset":
        changed = {name.upper(), "RUN_ID", *also}
        untouched = [f.name for f in fields(hp) if f.name.upper() not in changed]
        assert all(getattr(hp, other) == getattr(cls(), other) for other in untouched)


def test_switches_are_zero_and_one():
    assert Hyperparameters.from_env(dict(XSA="0")).xsa is False
    assert Hyperparameters.from_env(dict(XSA="1", EVAL_ONLY="1")).eval_only is True


def test_an_artifact_is_the_base_of_how_it_is_scored():
    base = Hyperparameters(model_dim=96, eval_stride=32, preset="demo", run_id="packed")
    before = Hyperparameters(**vars(base))
    hp = Hyperparameters.from_env(dict(EVAL_STRIDE="16", MODEL_DIM="96", PRESET="record"), base)
    assert (hp.model_dim, hp.eval_stride, hp.preset) == (96, 16, "demo")
    assert base == before
    with pytest.raises(ValueError, match="EVAL_STRIDE=0"):
        Hyperparameters.from_env(dict(EVAL_STRIDE="0"), base)


SCORING = set(
    "run_id seed artifact eval_only scores data_path tokenizer_path eval_mode eval_chunk eval_rows "
    "eval_seq_len eval_stride val_batch_size eval_seconds ttt ttt_lora_lr ttt_lora_rank "
    "ttt_lora_alpha ttt_lora_wd ttt_lr ttt_epochs ttt_chunk_tokens ttt_freeze_blocks "
    "ttt_phases".split()
)


@pytest.mark.parametrize("system, name", [case for case in FIELDS if case[1] != "preset"])
def test_what_an_artifact_was_trained_with_cannot_be_overridden(system, name):
    """What is logged as a hyperparameter is what was scored."""
    cls = SYSTEMS[system]
    field = next(field for field in fields(cls) if field.name == name)
    text = OWN_VALID.get(system, {}).get(name, VALID.get(name, OTHER[field.type]))
    env = {name.upper(): text}
    if name in SCORING:
        hp = cls.from_env(env | NEEDS.get((system, name), {}), cls())
        assert getattr(hp, name) != getattr(cls(), name) or name == "run_id"
    else:
        with pytest.raises(ValueError, match=f"^{name.upper()}=.*artifact"):
            cls.from_env(env, cls())
        same = {name.upper(): text_of(getattr(cls(), name))}
        assert getattr(cls.from_env(same, cls()), name) == getattr(cls(), name)


# -----------------------------------------------------------------------------
# what is refused


@pytest.mark.parametrize(
    "name, text, expected",
    [
        ("SEED", "a lot", "int"),
        ("SEED", "", "int"),
        ("MODEL_DIM", "512.0", "int"),
        ("MODEL_DIM", "5e2", "int"),
        ("MATRIX_LR", "fast", "float"),
        ("MATRIX_LR", "0,1", "float"),
        ("XSA", "true", "0 or 1"),
        ("XSA", "", "0 or 1"),
        ("XSA", "2", "0 or 1"),
        ("EVAL_ONLY", "no", "0 or 1"),
        ("PRESET", "recrod", "record.recrod.json"),
        ("PRESET", "", "No such file"),
        ("PRESET", "baseline", "No such file"),
    ],
)
def test_a_value_that_cannot_be_read_names_itself(name, text, expected):
    with pytest.raises(ValueError) as error:
        Hyperparameters.from_env({name: text})
    assert f"{name}={text!r}" in str(error.value) and expected in str(error.value)


@pytest.mark.parametrize("text", ['{"layout": "A6",}', '{"modeldim": 128}', "[]", "7", ""])
def test_a_preset_that_cannot_be_read_names_its_file(tmp_path, monkeypatch, text):
    (tmp_path / "presets").mkdir()
    path = tmp_path / "presets" / "record.mine.json"
    path.write_text(text)
    monkeypatch.setattr(train_gpt, "__file__", str(tmp_path / "train_gpt.py"))
    with pytest.raises(train_gpt.Refused) as error:
        Hyperparameters.from_env(dict(PRESET="mine"))
    assert str(error.value).startswith(f"PRESET='mine': no preset {path}: ")


@pytest.mark.parametrize("name, value", [("seed", 1.5), ("matrix_lr", "1"), ("layout", 3)])
def test_a_value_of_another_type_names_itself(name, value):
    """As an artifact could bring it."""
    with pytest.raises(ValueError, match=f"^{name.upper()}={value!r}: expected (int|float|str)$"):
        Hyperparameters(**{name: value}).validate()


POSITIVE = set(
    "VOCAB_SIZE TRAIN_BATCH_TOKENS TRAIN_SEQ_LEN MLP_MULT GDN_HEADS "
    "NUM_HEADS NUM_KV_HEADS WINDOW_SIZE ROPE_BASE LOGIT_SOFTCAP ITERATIONS "
    "EVAL_STRIDE VAL_BATCH_SIZE GPTQ_CALIBRATION_BATCHES "
    "MUON_BACKEND_STEPS EVAL_CHUNK EVAL_ROWS TTT_EPOCHS TTT_CHUNK_TOKENS "
    "TTT_LORA_RANK TRAIN_LOG_EVERY ATTN_GATE_DIMS GDN_KEY_HEADS".split()
)
# a row of one value has no deviation
TWO = set("MODEL_DIM GDN_HEAD_DIM HEAD_DIM NGRAM_DIM INST_DIM EVAL_SEQ_LEN".split())
SHARES = set(
    "WARMDOWN_FRAC MIN_LR EMA_DECAY EMA_START MUON_MOMENTUM_WARMUP_FRAC MUON_MOMENTUM BETA1 BETA2 "
    "ENABLE_LOOPING_AT".split()
)
BITS = {"MATRIX_BITS", "EMBED_BITS", "LOOP_BITS", "ATTN_OUT_BITS", "FREQUENT_BITS"}


def out_of_bounds(system: str):
    """(name, value, expected) of each number of a system just outside its bounds."""
    for field in fields(SYSTEMS[system]):
        name = field.name.upper()
        if field.type not in (int, float):
            continue
        if name in SHARES:
            bad = dict.fromkeys(("-0.1", "-1", "1.01", "nan"), "0 to 1")
        elif name in BITS:
            bad = dict.fromkeys(("-1", "1", "9"), "2 to 8")
        elif name == "VOCAB_SIZE":
            bad = dict.fromkeys(("-1", "0", "1", "65537"), "3 to 65536")
        elif name == "NGRAM_VOCAB_SIZE" and system == "crawler":
            bad = dict.fromkeys(("-1", "0", "1"), "2 or more")
        elif name == "SEED":
            bad = dict.fromkeys(("-1", str(10**18 + 1), str(2**64)), "0 to 1e+18")
        elif name == "CONV_SIZE":
            bad = dict.fromkeys(("-1", "0", "5"), "1 to 4")
        elif name == "ARTIFACT_TARGET_BYTES":
            bad = dict.fromkeys(("-1", "16000001"), "0 to 1.6e+07")
        elif name == "ROUNDING_STEP":
            bad = dict.fromkeys(("-1", "0", "0.0000009"), "1e-06 or more")
        elif name in TWO:
            bad = dict.fromkeys(("-1", "0", "1"), "2 or more")
        elif name in POSITIVE:
            bad = dict.fromkeys(("-1", "0"), "1 or more")
        else:
            bad = {"-1": "0 or more"}
        if field.type is float:
            bad["nan"] = bad["inf"] = bad["-1"]
        yield from ((name, value, expected) for value, expected in bad.items())


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_number_out_of_its_bounds_names_itself(system):
    cases = [*out_of_bounds(system)]
    assert len(cases) > 80
    for name, value, expected in cases:
        with pytest.raises(ValueError) as error:
            SYSTEMS[system].from_env({name: value})
        variable, found, rest = re.fullmatch(r"(\w+)=(\S+): (.*)", str(error.value)).groups()
        assert (variable, rest) == (name, "expected " + expected), name
        assert float(found) == float(value) or value == found == "nan"


def test_all_that_is_wrong_is_told_at_once():
    """Values that cannot be read, together with those out of bounds or else, where all are in
    bounds, those that do not fit each other."""
    for env in (
        dict(SEED="x", MATRIX_LR="y", XSA="2"),
        dict(SEED="-1", MATRIX_LR="inf", MODEL_DIM="1"),
        dict(EVAL_MODE="x", ROPE_DIMS="3", EVAL_STRIDE="9999", SCORES="a"),
        dict(SEED="x", MATRIX_LR="inf", BETA1="2"),
        dict(SEED="x", EVAL_MODE="x", NUM_KV_HEADS="3"),
    ):
        with pytest.raises(train_gpt.Refused) as error:
            Hyperparameters.from_env(env)
        named = [line.partition("=")[0] for line in str(error.value).splitlines()]
        assert sorted(named) == sorted(env)


IMPOSSIBLE = [  # system, environment, the variable to blame, what else the message must say
    ("record", dict(EVAL_MODE="overlapping"), "EVAL_MODE", "sliding or stream"),
    ("record", dict(EVAL_MODE=""), "EVAL_MODE", "sliding or stream"),
    ("record", dict(TTT="adam"), "TTT", "lora"),
    ("record", dict(TTT="sgd"), "TTT", "lora"),
    ("record", dict(TTT="lora", EVAL_MODE="sliding"), "TTT", "no lora"),
    ("record", dict(NUM_KV_HEADS="3"), "NUM_KV_HEADS", "to divide"),
    ("record", dict(NUM_KV_HEADS="16"), "NUM_KV_HEADS", "to divide"),
    ("record", dict(GDN_KEY_HEADS="3"), "GDN_KEY_HEADS", "to divide"),
    ("record", dict(GDN_HEADS="1"), "GDN_KEY_HEADS", "to divide"),
    ("record", dict(ROPE_DIMS="15"), "ROPE_DIMS", "HEAD_DIM"),
    ("record", dict(ROPE_DIMS="66"), "ROPE_DIMS", "HEAD_DIM"),
    ("transformer", dict(SMEAR_DIMS="513"), "SMEAR_DIMS", "MODEL_DIM"),
    ("record", dict(EVAL_STRIDE="2049"), "EVAL_STRIDE", "EVAL_SEQ_LEN"),
    ("record", dict(GPTQ_RESERVE_SECONDS="600"), "GPTQ_RESERVE_SECONDS", "less than MAX_WALL"),
    ("record", dict(MAX_WALLCLOCK_SECONDS="5"), "GPTQ_RESERVE_SECONDS", "less than MAX_WALL"),
    *(
        ("record", dict(LAYOUT=layout), "LAYOUT", "GSA with counts, such as G3 S")
        for layout in ("", "G5 X S", "g", "G0", "x2", "G2,S", "S S=0", "G S=", "G (S)x2")
    ),
    ("gdn_hybrid", dict(LAYOUT=""), "LAYOUT", "block"),
    ("gdn_hybrid", dict(LAYOUT="G5 X S"), "LAYOUT", "'X'"),
    ("gdn_hybrid", dict(LAYOUT="g"), "LAYOUT", "'g'"),
    ("gdn_hybrid", dict(LAYOUT="G0"), "LAYOUT", "'G0'"),
    ("gdn_hybrid", dict(LAYOUT="x2"), "LAYOUT", "'x2'"),
    ("gdn_hybrid", dict(LAYOUT="G G~0"), "LAYOUT", "'G~0'"),
    ("gdn_hybrid", dict(LAYOUT="S (G=1)x2"), "LAYOUT", "'G=1'"),
    ("gdn_hybrid", dict(LAYOUT="G (S)x1"), "LAYOUT", "(blocks)x2"),
    ("gdn_hybrid", dict(LAYOUT="G (S)x2 (S)x2"), "LAYOUT", "at most one group"),
    ("gdn_hybrid", dict(LAYOUT="G2,S"), "LAYOUT", "'G2,S'"),
    ("gdn_hybrid", dict(LAYOUT="G S="), "LAYOUT", "'S='"),
    ("gdn_hybrid", dict(LAYOUT="G S=0"), "LAYOUT", "'S=0'"),
    ("gdn_hybrid", dict(LAYOUT="S S=1"), "LAYOUT", "'S=1'"),
    ("gdn_hybrid", dict(LAYOUT="S S=7"), "LAYOUT", "'S=7'"),
    ("gdn_hybrid", dict(LAYOUT="S S=0 S=1"), "LAYOUT", "'S=1'"),
    ("kv_share", dict(TTT="lora"), "TTT", "sgd"),
    ("kv_share", dict(LAYOUT="G5"), "LAYOUT", "an even number of blocks G"),
    ("kv_share", dict(LAYOUT="G2 S2"), "LAYOUT", "an even number of blocks G"),
    ("kv_share", dict(LAYOUT="G S"), "LAYOUT", "an even number of blocks G"),
    ("kv_share", dict(NGRAM_VOCAB_SIZE="1"), "NGRAM_VOCAB_SIZE", "0 or more than 1"),
    ("crawler", dict(LAYOUT="A4"), "LAYOUT", "a group that loops"),
    ("gdn_hybrid", dict(NGRAM_VOCAB_SIZE="1"), "NGRAM_VOCAB_SIZE", "0 or more than 1"),
    ("hybrid_1895", dict(LAYOUT="G S"), "LAYOUT", "KIND"),
    ("hybrid_1895", dict(LAYOUT="A"), "LAYOUT", "more than one pass"),
    ("hybrid_1895", dict(HEAD_DIM="48"), "HEAD_DIM", "a power of 2"),
    ("hybrid_1895", dict(ROPE_DIMS="64"), "ROPE_DIMS", "less than HEAD_DIM"),
    ("hybrid_1895", dict(GDN_KEY_HEADS="3"), "GDN_KEY_HEADS", "to divide"),
    ("hybrid_1895", dict(FREQUENT="0f"), "FREQUENT", "2048 hexadecimal digits"),
    ("hybrid_1895", dict(FREQUENT="0g" * 1024), "FREQUENT", "2048 hexadecimal digits"),
    ("hybrid_1895", dict(TTT="lora"), "TTT", "sgd"),
    ("transformer", dict(TTT="sgd"), "TTT", "lora"),
    ("transformer", dict(ATTN_GATE_DIMS="513"), "ATTN_GATE_DIMS", "MODEL_DIM"),
    *(
        ("transformer", dict(PARALLEL_START_LAYER=start), "PARALLEL_START_LAYER", "second half")
        for start in ("11", "3", "1")
    ),
]


@pytest.mark.parametrize(
    "system, env, name, expected",
    IMPOSSIBLE,
    ids=["-".join([case[0], *(f"{k}={v}" for k, v in case[1].items())]) for case in IMPOSSIBLE],
)
def test_an_impossible_value_names_itself(system, env, name, expected):
    with pytest.raises(ValueError) as error:
        SYSTEMS[system].from_env(env)
    lines = [re.fullmatch(r"(\w+)='?([^:]*?)'?: (.*)", x) for x in str(error.value).splitlines()]
    assert {line[1] for line in lines} == {name}
    _, found, rest = lines[0].groups()
    assert expected in rest
    found, wanted = "1" if found == "True" else found, env.get(name, found)
    assert found == wanted or float(found) == float(wanted)


@pytest.mark.parametrize(
    "system, env",
    [
        ("record", dict(EVAL_STRIDE="2048")),
        ("record", dict(NUM_KV_HEADS="8")),
        ("record", dict(NUM_KV_HEADS="1")),
        ("record", dict(GDN_KEY_HEADS="4")),
        ("record", dict(GDN_KEY_HEADS="1")),
        ("record", dict(ROPE_DIMS="0")),
        ("record", dict(ROPE_DIMS="64")),
        ("gdn_hybrid", dict(SMEAR_DIMS="0")),
        ("gdn_hybrid", dict(SMEAR_DIMS="512")),
        ("record", dict(MATRIX_BITS="2")),
        ("record", dict(MATRIX_BITS="8")),
        ("record", dict(EMA_DECAY="0")),
        ("record", dict(MIN_LR="1")),
        ("record", dict(VOCAB_SIZE="65536")),
        ("record", dict(GPTQ_RESERVE_SECONDS="0")),
        ("record", dict(MAX_WALLCLOCK_SECONDS="0")),
        ("record", dict(MAX_WALLCLOCK_SECONDS="0", GPTQ_RESERVE_SECONDS="99")),
        ("record", dict(EVAL_SECONDS="0")),
        ("record", dict(LAYOUT="A")),
        ("gdn_hybrid", dict(LAYOUT="(A)x2")),
        ("gdn_hybrid", dict(LAYOUT="S S=0")),
        ("kv_share", dict(NGRAM_VOCAB_SIZE="0")),
        ("kv_share", dict(NGRAM_VOCAB_SIZE="2")),
        ("kv_share", dict(LAYOUT="G2")),
        ("crawler", dict(LOOP_BITS="8")),
        ("crawler", dict(LOOP_BITS="2")),
        ("crawler", dict(INST_DIM="2")),
        ("crawler", dict(NGRAM_VOCAB_SIZE="2")),
        ("crawler", dict(LAYOUT="(A)x2")),
        ("transformer", dict(ATTN_GATE_DIMS="512")),
        ("transformer", dict(PARALLEL_START_LAYER="0")),
        ("transformer", dict(PARALLEL_START_LAYER="10")),
        ("transformer", dict(LAYOUT="A2", PARALLEL_START_LAYER="1", ENABLE_LOOPING_AT="0")),
        ("transformer", dict(ENABLE_LOOPING_AT="1")),
    ],
    ids=str,
)
def test_the_border_of_what_is_possible_is_possible(system, env):
    hp = SYSTEMS[system].from_env(env)
    for name, value in env.items():
        found = getattr(hp, name.lower())
        assert text_of(found) == value or float(found) == float(value)


# -----------------------------------------------------------------------------
# micro-batches and stages


@pytest.mark.parametrize(
    "ranks, accumulation, steps",
    [(1, 0, 8), (2, 0, 4), (8, 0, 1), (3, 0, 2), (5, 0, 1), (16, 0, 1), (1, 3, 3), (3, 2, 2)],
)
def test_micro_batches_split_the_batch_evenly(monkeypatch, tiny, ranks, accumulation, steps):
    monkeypatch.setattr(train_gpt.world, "size", ranks)
    even, T = 5 * steps * ranks * 32, dict(train_seq_len=32, grad_accum_steps=accumulation)
    assert tiny(train_batch_tokens=even, **T).micro_steps() == steps
    for batch in even - 32, even + 16:
        with pytest.raises(ValueError, match=f"TRAIN_BATCH_TOKENS={batch}: .*{ranks} ranks"):
            tiny(train_batch_tokens=batch, **T).micro_steps()


@pytest.mark.parametrize(
    "text, expected",
    [
        ("0:3x64", [(0.0, 3, 64)]),
        ("0:1x16 0.25:2x32 0.5:3x64", [(0, 1, 16), (0.25, 2, 32), (0.5, 3, 64)]),
        *(
            (bad, None)
            for bad in (
                "",
                "0.1:3x64",
                "0:4x64",
                "0:0x64",
                "0:3x48",
                "0:3x128",
                "0:3x0",
                "3x64",
                "0:3",
                "0:-1x64",
                "0:1x16,0.5:3x64",
                "0:1x16 0.5:2x32 0.25:3x64",
                "0:1x16 1.5:2x32",
                "0:1x16 0.5:2x32x",
                "0:1x16 0:3x64",
            )
        ),
    ],
)
def test_stages_of_pure_gdn(text, expected):
    hp = pure_gdn.Hyperparameters(
        train_seq_len=64, train_batch_tokens=3 * 64, grad_accum_steps=3, curriculum=text
    )
    if expected is None:
        for refused in hp.stages, hp.validate:
            with pytest.raises(ValueError, match=f"^CURRICULUM='{text}': .*TRAIN_SEQ_LEN=64"):
                refused()
        return
    assert hp.stages() == expected and hp.stage_starts() == [stage[0] for stage in expected]
    borders = [*hp.stage_starts()[1:], 1.0]
    for (start, micro_steps, _), end in zip(expected, borders, strict=True):
        for progress in (start, math.nextafter(end, 0)):
            assert hp.micro_steps_at(progress) == micro_steps
