"""The environment variables of a run: hyperparameters as their source has them, and all others.

A hyperparameter is a field of the class Hyperparameters of train_gpt.py or systems/NAME.py. Its
default and bounds are the field's, its meaning is the comment behind it, its group the comment
above it, and what else it must be stands in the rules of the class. The class is executed without
its methods and nothing is imported, so that it takes a moment and no library must be there.
"""

import ast
import json
import math
import os
import shlex
import tokenize
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "train_gpt.py"


class Variable(NamedTuple):
    name: str
    default: str  # as the environment would have it
    expected: str
    meaning: str
    group: str


# Of hyperparameters whose name is enough beside the source, which has no comment on them.
MEANINGS = {
    "seed": "of weights, random tokens and adapters",
    "eval_only": "1: score ARTIFACT, train nothing",
    "data_path": "folder of the shards, fineweb_train_*.bin and fineweb_val_*.bin",
    "tokenizer_path": "SentencePiece model that the shards were made with",
    "vocab_size": "pieces of the tokenizer",
    "train_seq_len": "tokens of a row",
    "model_dim": "width of the residual stream",
    "mlp_mult": "hidden width of an MLP, in MODEL_DIM",
    "gdn_heads": "heads of Gated DeltaNet",
    "gdn_key_heads": "of these, with queries and keys of their own",
    "gdn_head_dim": "width of its keys and values",
    "num_heads": "heads of attention",
    "num_kv_heads": "of these, with keys and values of their own",
    "head_dim": "width of a head of attention",
    "rope_base": "base of the rotary frequencies",
    "qk_gain_init": "start of the gain of queries, one a head",
    "tied_embed_init_std": "of the embedding, which is the output head too",
    "logit_softcap": "c in c tanh(logits / c)",
    "matrix_lr": "peak learning rate of matrices, by Muon",
    "muon_momentum": "after its warm-up",
    "muon_momentum_warmup_start": "momentum of the first step",
    "muon_backend_steps": "Newton-Schulz steps, with the coefficients of Polar Express",
    "muon_wd": "weight decay of matrices",
    "tied_embed_lr": "peak learning rate of the embedding, by AdamW",
    "embed_wd": "weight decay of the embedding",
    "scalar_lr": "peak learning rate of all other parameters, by AdamW",
    "beta1": "of AdamW",
    "beta2": "of AdamW",
    "adam_eps": "of AdamW",
    "train_log_every": "steps; the first ten are logged too",
    "matrix_bits": "bits of a quantized weight of a matrix",
    "embed_bits": "bits of a quantized weight of the embedding",
    "eval_stride": "tokens that a sliding window scores",
    "ttt_lora_lr": "learning rate of the adapters, by AdamW",
    "ttt_lora_rank": "rank of an adapter",
    "ttt_lora_alpha": "adapters are scaled by this over their rank",
    "ttt_lora_wd": "weight decay of the adapters",
    "ngram_dim": "width of an entry of the n-gram table",
}

# Of run.sh and what it starts. Some are hyperparameters, too: here is what run.sh makes of them.
OTHERS = [
    Variable(*row, "run.sh and tools")
    for row in (
        ("SYSTEM", "", "a name", "file of systems/ to run; none: the record, train_gpt.py"),
        ("PRESET", "", "a name", "demo without a GPU, else record"),
        ("NPROC", "", "int, 1 or more", "processes; else 8, 4, 2 or 1 GPUs; 2 on a CPU"),
        ("DATA_PATH", "", "folder", "if set, it is taken as it is; else data/prepare.py fills it"),
        ("EVAL_ONLY", "", "0 or 1", "1: scores ARTIFACT, and does nothing else"),
        ("EVAL_SECONDS", "", "float, 0 or more", "0 unless NPROC is 8, whose limit it is"),
        ("CHECKPOINT_EVERY", "", "float, 0 or more", "seconds; 0: only when stopped; 8 GPUs: off"),
        ("RESUME", "", "auto or a path", "goes on from a checkpoint, see docs/runs.md"),
        ("AUTHOR", "", "text", "for submission.json"),
        ("GITHUB_ID", "", "text", "for submission.json"),
        ("HELP", "0", "0 or 1", "prints this and ends"),
        ("VENV", ".venv", "folder", "virtual environment, made if it is not there"),
        ("PYTHON", "python3", "program", "Python 3.11 or newer that makes VENV"),
        (
            "PIP_EXTRA_INDEX_URL",
            "",
            "URL",
            "of pip; without it torch for CPUs where there is no GPU",
        ),
        ("HF_TOKEN", "", "text", "of the hub, for data behind its terms"),
        ("HF_ENDPOINT", "", "URL", "of the hub or a mirror"),
        ("MATCHED_FINEWEB_REPO_ID", "", "OWNER/NAME", "dataset on the hub that is downloaded"),
        ("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", "datasets", "folder", "in it"),
        ("TRITON_HOME", "", "folder", "of compiled kernels; HOME, or here if that is read-only"),
        ("MALLOC_MMAP_MAX_", "", "int", "of glibc; 0 on a CPU: freed memory is kept"),
        ("MALLOC_TRIM_THRESHOLD_", "", "int", "of glibc; very large on a CPU, as above"),
        ("OMP_NUM_THREADS", "", "int", "threads of a process; else its share of the cores"),
        ("GOMP_SPINCOUNT", "", "int", "of GNU OpenMP; 1000 on a CPU: short waits for threads"),
        ("GPULESS", "", "full", "of ./run.sh test: the long form of tests/gpuless"),
    )
]


@cache
def systems() -> dict[str, Path]:
    """By name: the record and the files of systems/ whose Hyperparameters name a system."""
    paths = sorted((ROOT / "systems").glob("*.py"))
    own = [path for path in paths if "\n    system = " in path.read_text("utf-8")]
    return {"record": RECORD} | {path.stem: path for path in own}


@cache
def source_of(script: Path) -> tuple[ast.Module, ast.ClassDef, str]:
    text = script.read_text("utf-8")
    tree = ast.parse(text)
    classes = (node for node in tree.body if isinstance(node, ast.ClassDef))
    return tree, next(node for node in classes if node.name == "Hyperparameters"), text


def bases_of(script: Path) -> list[Path]:
    """The files beside it whose Hyperparameters it builds on."""
    modules = [base.value.id for base in source_of(script)[1].bases if hasattr(base, "value")]
    return [path for path in (script.with_name(f"{name}.py") for name in modules) if path.is_file()]


@cache
def namespace_of(script: Path) -> dict:
    """Hyperparameters without its methods, and what of the file its fields need."""
    tree, node, _ = source_of(script)
    names = dict(dataclass=dataclass, field=field, math=math, os=os)
    if script != RECORD:
        names |= namespace_of(RECORD)
        names["train_gpt"] = SimpleNamespace(**names)
    for path in bases_of(script):
        names[path.stem] = SimpleNamespace(**namespace_of(path))
    body = [x for x in node.body if isinstance(x, (ast.Assign, ast.AnnAssign))]
    body = body or [ast.Pass()]
    stripped = ast.ClassDef("Hyperparameters", node.bases, [], body, node.decorator_list)
    used = {x.id for x in ast.walk(stripped) if isinstance(x, ast.Name)}
    needed = [x for x in tree.body if used & names_defined(x)]
    module = ast.fix_missing_locations(ast.Module([*needed, stripped], []))
    exec(compile(module, script, "exec"), names)
    return names


def names_defined(node: ast.stmt) -> set[str]:
    """By a function, or as a constant."""
    if isinstance(node, ast.FunctionDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else []
    return {x.id for x in targets if isinstance(x, ast.Name)}


def comments_of(script: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Meaning and group of each field that the class has of its own."""
    _, node, text = source_of(script)
    lines = iter(text.splitlines(True)[: node.end_lineno])
    tokens = tokenize.generate_tokens(lambda: next(lines, ""))
    comments = {t.start[0]: t for t in tokens if t.type == tokenize.COMMENT}
    meanings, groups, group, line = {}, {}, "", node.lineno
    for x in (x for x in node.body if isinstance(x, ast.AnnAssign)):
        above = [comments[i] for i in range(line, x.lineno) if i in comments]
        titles = [t for t in above if t.line.lstrip().startswith("#")]
        group = titles[-1].string.lstrip("# ") if titles else group
        line = x.end_lineno
        groups[x.target.id] = group
        if line in comments:
            meanings[x.target.id] = comments[line].string.lstrip("# ")
    return meanings, groups


def replaced_in(script: Path) -> set[str]:
    """The methods of its class that do not call those of the same name that it inherits."""
    methods = [x for x in source_of(script)[1].body if isinstance(x, ast.FunctionDef)]
    return {x.name for x in methods if f"super().{x.name}(" not in ast.unparse(x)}


def rules_of(script: Path, hp_class: type, without: set[str]) -> list[tuple[str, str]]:
    """Fields and what the methods of the class expect of them, as they say it when they refuse."""
    names, rules = {f.name for f in fields(hp_class)}, []
    methods = [x for x in source_of(script)[1].body if getattr(x, "name", "") not in without]
    for node in (node for method in methods for node in ast.walk(method)):
        parts = node.elts if isinstance(node, ast.Tuple) else getattr(node, "args", [])
        if isinstance(parts, list) and len(parts) == 3 and isinstance(parts[0], ast.Constant):
            name, text = parts[0].value, words_of(parts[2], hp_class)
            rules += [(name, text)] * bool(name in names and text)
    return rules


def words_of(node: ast.expr, hp_class: type) -> str:
    """A string of the source, with the variables of the class put in; "" if it has others."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    words = []
    for part in getattr(node, "values", [None]):
        value = part.value if isinstance(part, ast.Constant) else None
        if isinstance(part, ast.FormattedValue) and isinstance(part.value, ast.Attribute):
            value = getattr(hp_class, part.value.attr, None)
        if value is None:
            return ""
        words.append(str(value))
    return "".join(words)


def as_text(value) -> str:
    """As the environment would have it, quoted for a shell."""
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, float):
        return repr(value).removesuffix(".0")
    return shlex.quote(str(value))


def expected_of(f) -> str:
    if f.type not in (int, float):
        return "0 or 1" if f.type is bool else "text"
    low, high = f.metadata.get("bounds", (0, math.inf))
    return f"{f.type.__name__}, {low:g} to {high:g}".replace("to inf", "or more")


def names_of(script: Path) -> set[str]:
    """Of its hyperparameters. Raises: ValueError naming the file, as below."""
    try:
        return {f.name.upper() for f in fields(namespace_of(script)["Hyperparameters"])}
    except Exception as error:  # whatever a source in the making does
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{script}: its fields cannot be read: {reason}") from None


def hyperparameters(script: Path, preset: str = "record") -> list[Variable]:
    """Of a system, in the order of its fields, the new ones behind those of the record, with the
    defaults of the preset. Raises: ValueError naming what cannot be read, OSError."""
    names_of(script)
    hp_class, found, rules = namespace_of(script)["Hyperparameters"], [], []
    (meanings, groups), system = comments_of(RECORD), hp_class.system
    if script != RECORD:
        own, _ = comments_of(script)
        meanings |= own
    paths = [*dict.fromkeys((RECORD, *bases_of(script), script))]
    for i, path in enumerate(paths, 1):
        replaced = set().union(*map(replaced_in, paths[i:]))
        rules += [rule for rule in rules_of(path, hp_class, replaced) if rule not in rules]
    given = read_preset(system, preset) | {"preset": preset}
    for f in fields(hp_class):
        value = given.get(f.name, f.default)
        default = "<anew>" if value is MISSING else as_text(value)
        notes = [
            meanings.get(f.name, MEANINGS.get(f.name, "")),
            *(f"expected {x}" for name, x in rules if name == f.name),
        ]
        meaning = "; ".join(filter(None, notes))
        group = groups.get(f.name, f"only {system}") or "run"
        found.append(Variable(f.name.upper(), default, expected_of(f), meaning, group))
    return found


def read_preset(system: str, preset: str) -> dict:
    """Raises: ValueError if the system has no such preset."""
    if preset == "record":
        return {}
    path = ROOT / "presets" / f"{system}.{preset}.json"
    if not path.is_file():
        there = [p.name.split(".")[1] for p in path.parent.glob(f"{system}.*.json")]
        expected = f"expected one of {', '.join(['record', *sorted(there)])}"
        raise ValueError(f"PRESET={preset!r}: no file {path}, {expected}")
    return json.loads(path.read_text("utf-8"))
