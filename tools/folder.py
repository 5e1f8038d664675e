"""The folder of a submission, records/track_<track>/<date>_<slug>/, from the logs of its seeds.

The sources are those that the logs start with, and every number is the logs'. tools/record.py reads
and refuses; here is what its seeds must have in common, and what is written of them.
"""

import ast
import json
import os
import re
import shlex
import shutil
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))  # not there with PYTHONSAFEPATH
import dialects  # noqa: E402  (the path comes first)
import rules  # noqa: E402
from significance import deviation, mean  # noqa: E402

import logs  # noqa: E402

FILL_IN = "TO FILL IN BY THE AUTHOR"
# of a run, not of the submission: may differ between seeds, and are left out of the run command
OWN_SETTINGS = {"seed", "run_id", "artifact", "scores", "data_path", "tokenizer_path"}
NOT_ASKED = {"seed", "run_id", "artifact", "scores", "eval_only", "system", "preset"}
IN_COMMON = "system layout documents bytes official hardware pytorch_version bytes_code".split()
ARCHITECTURE = (
    "layout model_dim mlp_mult gdn_heads gdn_key_heads gdn_head_dim num_heads num_kv_heads "
    "head_dim window_size rope_dims vocab_size train_seq_len train_batch_tokens ema_decay "
    "matrix_bits embed_bits eval_mode ttt"
).split()


class Seed(NamedTuple):
    log: Path
    run: logs.Run
    report: dialects.Report
    verified: dict[str, bool]
    place: str  # which run of its log it is

    @property
    def figures(self) -> dict:
        return self.run.figures

    @property
    def sources(self) -> list[str]:
        """As they ran; the log has a line break more behind each."""
        return [source.removesuffix("\n") for source in self.run.sources]


class Wanted(NamedTuple):
    """What the author says of the submission."""

    title: str
    slug: str
    blurb: str | None
    author: str | None
    github_id: str | None
    date: str
    track: str


# --------------------------------------------------------------------------------------------------
# What is refused


def differences(seeds: list[Seed]) -> list[str]:
    """What must be the same in all of them and is not."""
    first, found = seeds[0], []
    for other in seeds[1:]:
        where = f"{other.log}: not of one configuration with {first.log}"
        if other.sources != first.sources:
            found.append(f"{where}: its sources are others")
        mine, names = other.run.settings, first.run.settings.keys() | other.run.settings.keys()
        names = [
            n for n in sorted(names - OWN_SETTINGS) if mine.get(n) != first.run.settings.get(n)
        ]
        names += [n for n in IN_COMMON if other.figures.get(n) != first.figures.get(n)]
        for name in dict.fromkeys(names):
            values = (x.run.settings.get(name, x.figures.get(name)) for x in (other, first))
            found.append(f"{where}: {name} is {' not '.join(map(repr, values))}")
    return found


def repeated(seeds: list[Seed]) -> list[str]:
    by_seed: dict[int, list[str]] = {}
    for seed in seeds:
        by_seed.setdefault(seed.figures["seed"], []).append(str(seed.log))
    same = {seed: names for seed, names in by_seed.items() if len(names) > 1}
    return [f"{', '.join(names)}: seed {seed} in each: give one" for seed, names in same.items()]


def unfit(seed: Seed, track: str) -> list[str]:
    """What keeps it out of the track."""
    figures, found = seed.figures, []
    if figures["bytes_total"] > rules.SIZE_LIMIT:
        found.append(f"{figures['bytes_total']} bytes, the cap is {rules.SIZE_LIMIT}")
    size = sum(len(source.encode()) for source in seed.sources)
    if size != figures["bytes_code"]:
        found.append(f"its sources are {size} bytes, {figures['bytes_code']} were counted")
    if track == rules.RECORD_TRACK:
        found += unfit_for_record(seed)
    return [f"{seed.log}: {line}" for line in found]


def unfit_for_record(seed: Seed) -> list[str]:
    figures, limit, found = seed.figures, rules.SECONDS_LIMIT, []
    other = f"give --track {rules.OTHER_TRACK}"
    for name in "wallclock_seconds", "eval_time_seconds":
        if figures[name] > limit:
            found.append(f"{name} {figures[name]}, a record has {limit}: {other}")
    if not figures["official"]:
        text = f"{figures['documents']} documents, {figures['bytes']} bytes"
        found.append(f"scored {text}, not the official split: {other}")
    if seed.run.resumed:
        found.append(f"a resumed run, a record is trained in one go: {other}")
    if not rules.may_be_record_hardware(figures["hardware"]):
        found.append(f"ran on {figures['hardware']}, a record on 8xH100: {other}")
    return found


def complaints(seeds: list[Seed], track: str) -> list[str]:
    found = [line for seed in seeds for line in unfit(seed, track)]
    return found + repeated(seeds) + differences(seeds)


# --------------------------------------------------------------------------------------------------
# Code


def name_sources(seed: Seed, root: Path) -> dict[str, str]:
    """Sources by file name: train_gpt.py, then those of systems/ in the order of their names, as a
    run logs them. Raises: ValueError if they are not as many as the system imports."""
    core, *rest = seed.sources
    imported = re.findall(r"^\s*(?:import|from) (\w+)", "\n".join(rest), re.M)
    near = {name for name in imported if (root / "systems" / f"{name}.py").is_file()}
    system = seed.figures["system"]
    names = sorted(near | {system} - {"record"})
    if len(names) != len(rest):
        expected = f"{len(names)} of systems/ ({', '.join(names) or 'none'})"
        raise ValueError(
            f"{seed.log}: {len(rest)} sources beside train_gpt.py, expected {expected}"
        )
    files = [f"systems/{name}.py" for name in names]
    return dict(zip(["train_gpt.py", *files], [core, *rest], strict=True))


def changed(sources: dict[str, str], root: Path) -> list[str]:
    """Files that are no longer in the work tree as they ran."""
    texts = {name: root / name for name in sources}
    texts = {name: p.read_text("utf-8") if p.is_file() else None for name, p in texts.items()}
    return [name for name, source in sources.items() if texts[name] != source]


def defaults(sources: dict[str, str], system: str) -> dict[str, str]:
    """Of the hyperparameters, as a log writes them: train_gpt.py's, then the system's own."""
    found = {}
    for name in "train_gpt.py", f"systems/{system}.py":
        tree = ast.parse(sources.get(name, ""))
        classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
        body = [x for node in classes if node.name == "Hyperparameters" for x in node.body]
        for field in (x for x in body if isinstance(x, ast.AnnAssign) and x.value):
            is_bounded = isinstance(field.value, ast.Call) and field.value.args
            value = field.value.args[0] if is_bounded else field.value
            if isinstance(value, (ast.Constant, ast.UnaryOp)):
                found[field.target.id] = str(ast.literal_eval(value))
    return found


def command(seed: Seed, sources: dict[str, str]) -> str:
    """That repeats the run, of any seed, in the folder."""
    known = defaults(sources, seed.figures["system"])
    asked = {n: x for n, x in seed.run.settings.items() if n not in NOT_ASKED and known.get(n) != x}
    words = [f"{name.upper()}={shlex.quote(value)}" for name, value in asked.items()]
    ranks = re.match(r"\d+", seed.figures["hardware"])
    ranks = int(ranks[0]) if ranks else 1
    start = f"torchrun --standalone --nproc_per_node={ranks}" if ranks > 1 else "python"
    script = f"systems/{seed.figures['system']}.py"
    words += ["SEED=$SEED", f"{start} {script if script in sources else 'train_gpt.py'}"]
    lines, line = [], ""
    for word in words:
        if len(line) + len(word) > 92:
            lines, line = [*lines, line], ""
        line += f"{word} "
    return "\\\n    ".join([*lines, line]).strip()


# --------------------------------------------------------------------------------------------------
# submission.json


def result_of(seed: Seed) -> dict:
    figures, quantized = seed.figures, seed.report.quantized
    return {
        "val_loss": figures["val_loss"],
        "val_bpb": figures["val_bpb"],
        "pre_quant_val_bpb": figures["pre_quant_val_bpb"],
        "post_quant_val_bpb": quantized and quantized.bpb,
        "steps": figures["step_stop"],
        "step_avg_ms": seed.report.step_ms and round(seed.report.step_ms, 2),
        "train_time_s": figures["wallclock_seconds"],
        "eval_time_s": figures["eval_time_seconds"],
        "artifact_bytes": figures["bytes_total"],
        "artifact_sha256": figures.get("artifact_sha256"),
    }


def scores_of(results: list[dict]) -> dict:
    """Mean and sample standard deviation, None of one seed."""
    values = {name: [x[name] for x in results] for name in ("val_loss", "val_bpb")}
    found = {name: mean(x) for name, x in values.items()}
    return found | {f"{name}_std": deviation(x) for name, x in values.items()}


def compliance_of(seeds: list[Seed]) -> dict:
    every = [seed.figures for seed in seeds]
    limit = rules.SECONDS_LIMIT
    verified = [set(seed.verified) for seed in seeds]
    return {
        "artifact_under_16mb": all(x["bytes_total"] <= rules.SIZE_LIMIT for x in every),
        "train_under_600s": all(x["wallclock_seconds"] <= limit for x in every),
        "eval_under_600s": all(x["eval_time_seconds"] <= limit for x in every),
        "full_validation_split": all(x["official"] for x in every),
        "three_seeds": len(seeds) >= rules.SEEDS,
        "not_resumed": not any(seed.run.resumed for seed in seeds),
        "audit": {name: True for name in every[0]["checks"]},
        "verified": {name: True for name in seeds[0].verified if all(name in x for x in verified)},
    }


def submission(seeds: list[Seed], wanted: Wanted) -> dict:
    """Scores of another text than the official split stand in `own_text` only."""
    figures, results = seeds[0].figures, [result_of(seed) for seed in seeds]
    totals, scores = [x["artifact_bytes"] for x in results], scores_of(results)
    official = figures["official"]
    text = {name: figures[name] for name in ("data_path", "documents", "bytes")}
    record = {name: getattr(wanted, name) for name in ("author", "github_id")}
    name = wanted.title if official else f"{wanted.title} (own text, no score of the competition)"
    record |= {"name": name, "blurb": wanted.blurb, "date": wanted.date}
    record |= {"track": wanted.track} | (scores if official else dict.fromkeys(scores))
    record |= {"own_text": None if official else text | scores}
    record |= {"seeds": [seed.figures["seed"] for seed in seeds]}
    named = {str(seed.figures["seed"]): x for seed, x in zip(seeds, results, strict=True)}
    record |= {"seed_results" if official else "own_text_seed_results": named}
    record |= {"bytes_total": max(totals), "bytes_code": figures["bytes_code"]}
    record |= {"artifact_bytes_mean": mean(totals), "artifact_bytes_max": max(totals)}
    record |= {name: figures[name] for name in ("hardware", "pytorch_version", "system", "layout")}
    return record | {"compliance": compliance_of(seeds)}


# --------------------------------------------------------------------------------------------------
# README.md


def number(value: float | int | None, digits: int = 0) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def results_table(seeds: list[Seed]) -> str:
    final = "Post-TTT" if seeds[0].run.settings.get("ttt") else "Final"
    unit = "val_bpb" if seeds[0].figures["official"] else "bpb of own text"
    head = ["Seed", "Steps", "ms/step", "Pre-quant", "Post-quant", f"**{final} {unit}**"]
    head += ["Artifact bytes", "train s", "eval s"]
    keys = "steps step_avg_ms pre_quant_val_bpb post_quant_val_bpb val_bpb artifact_bytes"
    keys = [*keys.split(), "train_time_s", "eval_time_s"]
    digits = [0, 2, 5, 4, 5, 0, 1, 1]
    results, rows = [result_of(seed) for seed in seeds], []
    for seed, result in zip(seeds, results, strict=True):
        cells = [number(result[key], n) for key, n in zip(keys, digits, strict=True)]
        rows.append([str(seed.figures["seed"]), *cells])
    for label, of in (("**Mean**", mean), ("Std", deviation)):
        columns = [[x[key] for x in results if x[key] is not None] for key in keys]
        cells = [
            number(of(x) if x else None, max(n, 1)) for x, n in zip(columns, digits, strict=True)
        ]
        rows += [[label, *cells]] if len(seeds) > 1 else []
    return table(head, rows)


def headline(seeds: list[Seed], wanted: Wanted) -> str:
    """Title line and bold first line."""
    figures, n = seeds[0].figures, len(seeds)
    scores = scores_of([result_of(seed) for seed in seeds])
    kind = "Record" if wanted.track == rules.RECORD_TRACK else "Non-record"
    runs = f"{n}-seed mean" if n > 1 else "one seed"
    spread = f", std {scores['val_bpb_std']:.5f}" if n > 1 else ""
    size = max(seed.figures["bytes_total"] for seed in seeds)
    costs = f"({runs}{spread}) | **{size:,} bytes** | {figures['hardware']}"
    if figures["official"]:
        title = f"# {kind}: {wanted.title} — val_bpb {scores['val_bpb']:.4f} ({runs})"
        return f"{title}\n\n**val_bpb: {scores['val_bpb']:.5f}** {costs}"
    return (
        f"# {kind}: {wanted.title} — own text, no val_bpb of the competition\n\n"
        f"**Own text: {scores['val_bpb']:.5f} bits per byte** {costs}\n\n"
        f"The scores below are of an own text, {figures['documents']:,} documents of "
        f"{figures['bytes']:,} bytes (`{figures['data_path']}`), not of the competition's split. "
        "They compare with no score of the competition; `val_bpb` in `submission.json` is null."
    )


def architecture(seed: Seed) -> str:
    rows = [
        [f"`{x}`", seed.run.settings[x] or "none"] for x in ARCHITECTURE if x in seed.run.settings
    ]
    parameters = seed.report.fact("parameters")
    rows += [["parameters", number(parameters)]] if parameters else []
    return table(["Setting", "Value"], [[name, f"`{value}`"] for name, value in rows])


def compliance(seeds: list[Seed]) -> str:
    every, limit = [seed.figures for seed in seeds], rules.SECONDS_LIMIT
    train, scoring, size = (
        max(x[name] for x in every)
        for name in ("wallclock_seconds", "eval_time_seconds", "bytes_total")
    )
    first, checks = every[0], compliance_of(seeds)
    lines = [
        f"training with its last read of data: at most {train:.1f} s of {limit}",
        f"evaluation: at most {scoring:.1f} s of {limit}",
        f"artifact and code: at most {size:,} of {rules.SIZE_LIMIT:,} bytes; code "
        f"{first['bytes_code']:,}, as it lies here, uncompressed",
        f"validation: {first['documents']:,} documents, {first['bytes']:,} bytes, "
        + ("the official split" if first["official"] else "not the official split"),
        "resumed from a checkpoint: " + ("no" if checks["not_resumed"] else "yes"),
        f"checks of the run itself, passed in each: {', '.join(checks['audit'])}",
        f"checks of the artifact from outside, passed by each: {', '.join(checks['verified'])}",
    ]
    return "\n".join(f"* {line}" for line in lines)


def included(seeds: list[Seed], sources: dict[str, str]) -> str:
    lines = [
        f"`{name}`: {len(source.encode()):,} bytes, counted" for name, source in sources.items()
    ]
    for seed in seeds:
        place = f"; {seed.place}" if seed.place else ""
        lines.append(f"`{log_name(seed)}`: the whole log, with the source that ran{place}")
    lines += ["`submission.json`, `requirements.txt`, `README.md`"]
    return "\n".join(f"* {line}" for line in lines)


def log_name(seed: Seed) -> str:
    return f"train_seed{seed.figures['seed']}.log"


def requirements_text(seed: Seed, requirements: str) -> str:
    ran = seed.figures["pytorch_version"]
    pinned = re.search(r"^torch==(\S+)", requirements, re.M)
    hardware = seed.figures["hardware"]
    text = f"`pip install -r requirements.txt`. The logs' PyTorch: {ran}, on {hardware}."
    if pinned and pinned[1] != ran.partition("+")[0]:
        text += f" `requirements.txt` pins {pinned[1]}."
    return text


def readme(seeds, wanted: Wanted, sources, requirements: str, comparison: list[str]) -> str:
    to_fill = f"**{FILL_IN}:**"
    parts = [headline(seeds, wanted)]
    parts += [wanted.blurb] if wanted.blurb else []
    parts += ["## Results", results_table(seeds)]
    parts.append("All in bits per byte of the validation text; sizes are artifact and code.")
    if comparison:
        parts += ["## Significance", "\n".join(f"    {line}" for line in comparison)]
    parts += ["## Architecture", architecture(seeds[0])]
    parts += ["## Run Command", f"```bash\n{command(seeds[0], sources)}\n```"]
    seeds_text = ", ".join(str(seed.figures["seed"]) for seed in seeds)
    parts.append(f"`SEED` was {seeds_text}. {to_fill} how the data at `DATA_PATH` are made or got.")
    parts += ["## Requirements", requirements_text(seeds[0], requirements)]
    parts += ["## Compliance", compliance(seeds)]
    parts += ["## Included Files", included(seeds, sources)]
    parts += ["## Credits", f"{to_fill} whose work this builds on."]
    return "\n\n".join(parts) + "\n"


# --------------------------------------------------------------------------------------------------
# The folder


def log_text(seed: Seed) -> str:
    """Of this run alone, as its log has it."""
    return f"{logs.RULE}\n".join([*seed.run.sources, seed.run.versions, seed.run.text])


def files_of(seeds, wanted: Wanted, sources, requirements: str, comparison) -> dict[str, str]:
    """All that the folder holds, by name."""
    record = json.dumps(submission(seeds, wanted), indent=2) + "\n"
    text = readme(seeds, wanted, sources, requirements, comparison)
    texts = {"README.md": text, "submission.json": record, "requirements.txt": requirements}
    return sources | texts | {log_name(seed): log_text(seed) for seed in seeds}


def write(target: Path, files: dict[str, str]) -> None:
    """The whole folder or none. Raises: OSError, FileExistsError if the folder is there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    try:
        temporary.chmod(0o755)
        for name, text in files.items():
            (temporary / name).parent.mkdir(exist_ok=True)
            (temporary / name).write_text(text, "utf-8", newline="")
        if target.exists():  # an empty one would be replaced
            raise FileExistsError(17, os.strerror(17), str(target))
        os.rename(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
