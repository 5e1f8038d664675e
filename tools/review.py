"""What a reviewer would ask about the folder of a submission, whoever made it.

Only files are looked at: README.md, submission.json, logs in any dialect of dialects.py, code as
text. Nothing is run. A question is no verdict: it names a file, what was found there, and why that
is asked. What the files do not show is listed at the end.
"""

import ast
import json
import math
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # not there with PYTHONSAFEPATH
import compare  # noqa: E402  (the path comes first)
import dialects  # noqa: E402
import rules  # noqa: E402
from folder import FILL_IN  # noqa: E402
from significance import deviation, mean  # noqa: E402

KEYS = "author", "github_id", "name", "date", "val_bpb"
# of the competition's own script, and what comes with torch
COMMON_PACKAGES = {"torch", "numpy", "sentencepiece", "triton"}
LATE = 0.9  # of the steps; the losses behind are those of the end
ROUNDING = 6e-5  # of a score that somebody copied with four digits

CANNOT_SEE = (
    "that validation text is the official one, beyond its targets and bytes",
    "that training read none of the validation text",
    "that each target was scored once, before anything learned from it, and without later tokens",
    "that the artifact is the one that was scored, and that the code is what ran",
    "how many runs were made and not shown",
)


@dataclass(frozen=True)
class Folder:
    path: Path
    texts: dict[str, str]  # README.md, requirements.txt
    code: dict[str, str]  # .py, by name
    reports: list[dialects.Report]  # of logs that hold a training
    others: list[dialects.Report]  # of logs that hold none, or lie in other folders

    @cached_property
    def submission(self) -> dict | None:
        """None if there is none that is JSON."""
        try:
            found = json.loads((self.path / "submission.json").read_text("utf-8"))
        except (OSError, ValueError, RecursionError):
            return None
        return found if isinstance(found, dict) else None

    def claim(self, name: str) -> float | None:
        """A number of submission.json."""
        value = (self.submission or {}).get(name)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return value if is_number else None

    @property
    def is_record(self) -> bool:
        track = f"{self.path.resolve().parent.name} {(self.submission or {}).get('track')}"
        return "non" not in track.lower().replace("none", "")

    @property
    def readme(self) -> str:
        return self.texts.get("README.md", "")

    @property
    def all_code(self) -> str:
        return "\n".join(self.code.values())

    @cached_property
    def scored(self) -> list[dialects.Report]:
        return [report for report in self.reports if report.final]

    def seed_results(self) -> dict[str, dict]:
        found = (self.submission or {}).get("seed_results")
        found = found if isinstance(found, dict) else {}
        return {seed: x for seed, x in found.items() if isinstance(x, dict)}


def read(path: Path) -> Folder:
    """Raises: OSError if it is no folder."""
    names = sorted(path.iterdir())
    texts = [path / name for name in ("README.md", "requirements.txt")]
    texts = {file.name: text_of(file) for file in texts if file.is_file()}
    code = [*names, *path.glob("systems/*.py")]
    code = {str(f.relative_to(path)): text_of(f) for f in code if f.suffix == ".py"}
    near = compare.logs_of(path)
    every = [file for file in (*near, *sorted(path.rglob("*.log"))) if file.is_file()]
    logs = {file: dialects.read_if(file) for file in every}
    logs = {file: log for file, log in logs.items() if log}
    trained = [log for file, log in logs.items() if file in near and log.is_training]
    return Folder(path, texts, code, trained, [log for log in logs.values() if log not in trained])


def text_of(file: Path) -> str:
    return file.read_text("utf-8", errors="replace")


def name_of(report: dialects.Report) -> str:
    return report.path.name


# --------------------------------------------------------------------------------------------------
# Files


def ask_files(folder: Folder) -> Iterator[str]:
    for name in "README.md", "submission.json", "train_gpt.py":
        if not (folder.path / name).is_file():
            yield f"{name}: missing"
    if not folder.reports:
        yield "no log of a training that is known: expected train_seed<N>.log"
    if not re.match(r"\d{4}-\d\d-\d\d_\S+$", folder.path.resolve().name):
        yield f"name {folder.path.resolve().name!r}: expected <YYYY-MM-DD>_<slug>, without spaces"
    for mark in sorted(set(re.findall(rf"{FILL_IN}|\bTBD\b|\bPLACEHOLDER\b", folder.readme))):
        yield f"README.md: still says {mark!r}"
    yield from ask_submission(folder)
    yield from ask_imports(folder)


def ask_submission(folder: Folder) -> Iterator[str]:
    if folder.submission is None:
        if (folder.path / "submission.json").is_file():
            yield "submission.json: not a JSON object"
        return
    own_text = folder.submission.get("own_text")
    keys = KEYS[:-1] if own_text else KEYS  # of another text there is no val_bpb
    missing = [key for key in keys if folder.submission.get(key) in (None, "")]
    if missing:
        yield f"submission.json: without {', '.join(missing)}"
    if isinstance(folder.submission.get("val_bpb"), str):
        yield f"submission.json: val_bpb is the text {folder.submission['val_bpb']!r}, no number"
    if own_text and folder.is_record:
        yield "submission.json: scores of an own text, in the record track"


def ask_imports(folder: Folder) -> Iterator[str]:
    """Whether the code parses, and whether anybody says where its modules come from."""
    named = "\n".join(folder.texts.values()).lower().replace("-", "_")
    here = {Path(name).stem for name in folder.code} | COMMON_PACKAGES | sys.stdlib_module_names
    for name, source in folder.code.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(source)
        except (SyntaxError, ValueError, RecursionError) as error:
            version = ".".join(map(str, sys.version_info[:2]))
            yield f"{name}: does not parse with Python {version}: {error}"
            continue
        for module in sorted(imported(tree) - here):
            if not is_named(module, named):
                yield f"{name}: imports {module}, which neither README nor requirements.txt names"


def imported(tree: ast.Module) -> set[str]:
    """Modules that are needed: not those that a try block may do without."""
    optional = {
        id(x) for node in ast.walk(tree) if isinstance(node, ast.Try) for x in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and id(node) not in optional:
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and id(node) not in optional and not node.level:
            found.add((node.module or "").partition(".")[0])
    return found


def is_named(module: str, text: str) -> bool:
    known = {"fla": "flash_linear_attention|fla_core", "yaml": "pyyaml"}
    if module.startswith("flash_attn"):
        return bool(re.search("flash[_ ]?att(n|ention)|fa3", text))
    return bool(re.search(known.get(module, module.lower()), text))


# --------------------------------------------------------------------------------------------------
# Size and code


def ask_size(folder: Folder) -> Iterator[str]:
    limit, counted = rules.SIZE_LIMIT, sum(len(x.encode()) for x in scored_code(folder).values())
    for report in folder.reports:
        total, name = report.bytes_total, name_of(report)
        model, code = report.bytes_model, report.bytes_code
        if total is None and model and counted:
            total, name = model + counted, f"{name}: artifact with the code as it lies here"
        if total and total > limit:
            yield f"{name}: {total:,} bytes, the cap is {limit:,}"
        if report.bytes_total and model and code and model + code != total:
            yield f"{name}: {model:,} + {code:,} bytes are not the {total:,} that it says"
    yield from ask_claimed_size(folder, counted)
    yield from ask_code_size(folder, counted)


def scored_code(folder: Folder) -> dict[str, str]:
    """train_gpt.py and what it or these import from here."""
    names = ["train_gpt.py"] if "train_gpt.py" in folder.code else []
    for name in names:
        words = set(re.findall(r"^\s*(?:import|from) +(\w+)", folder.code[name], re.M))
        near = [x for x in folder.code if Path(x).stem in words and x not in names]
        names += near
    names += [name for name in folder.code if name.startswith("systems/") and name not in names]
    return {name: folder.code[name] for name in names}


def ask_claimed_size(folder: Folder, counted: int) -> Iterator[str]:
    claimed = folder.claim("bytes_total")
    if claimed is None:
        return
    if claimed > rules.SIZE_LIMIT:
        yield f"submission.json: bytes_total {claimed:,}, the cap is {rules.SIZE_LIMIT:,}"
    totals = {report.bytes_total for report in folder.reports if report.bytes_total}
    models = {report.bytes_model for report in folder.reports if report.bytes_model}
    if totals and claimed not in totals and abs(claimed - mean(sorted(totals))) > 1:
        yield f"submission.json: bytes_total {claimed:,}, the logs say {numbers(totals)}"
    elif models and not totals and claimed in models:
        yield f"submission.json: bytes_total {claimed:,} is an artifact's size without code"
    elif models and not totals and claimed not in {model + counted for model in models}:
        found = f"artifacts {numbers(models)} and {counted:,} bytes of code here"
        yield f"submission.json: bytes_total {claimed:,} is the sum of none of the {found}"


def ask_code_size(folder: Folder, counted: int) -> Iterator[str]:
    logged = {report.bytes_code for report in folder.reports if report.bytes_code}
    script = len(folder.code.get("train_gpt.py", "").encode())
    if not logged or not script:
        return
    if len(logged) > 1:
        yield f"logs count {numbers(logged)} bytes of code: not one script for all seeds?"
    if logged & {script, counted}:
        return
    total = counted + max((x.bytes_model for x in folder.reports if x.bytes_model), default=0)
    found = f"{script:,}" if script == counted else f"{script:,}, {counted:,} with its imports"
    over = f"; with that it would be {total:,}, over the cap" if total > rules.SIZE_LIMIT else ""
    yield f"logs count {numbers(logged)} bytes of code, train_gpt.py here has {found}{over}"


def numbers(values) -> str:
    return ", ".join(f"{value:,}" for value in sorted(values))


UNPACKS = r"\b[ab]85decode|\bb(?:64|85)decode|\b(?:lzma|zlib|brotli|zstd\w*|\w*[Dd]ecompress\w*)\b"


def ask_code(folder: Folder) -> Iterator[str]:
    for name, source in folder.code.items():
        runs = re.search(r"\bexec\s*\(|\bos\.exec|\brunpy\b|\bcompile\s*\(", source)
        longest = max(map(len, source.splitlines()), default=0)
        if runs and longest > 2000 and re.search(UNPACKS, source):
            found = f"{longest:,} characters in a line"
            yield f"{name}: unpacks and executes itself, {found}: unreadable"
        if doubled_spaces(source):
            yield f"{name}: its byte table counts the leading space, and scoring adds it again"


def doubled_spaces(source: str) -> bool:
    """A table with the space in it, and a second one of leading spaces that is added to it."""
    table = r"\[1:\]\.encode\([^)]*\)\)\s*\+\s*1\b"
    added = r"(?:has_(?:leading_)?space\w*)\[[^\n]*&\s*~|\bhas_space\w*\[[^\n]*\*"
    return bool(re.search(table, source) and re.search(added, source))


# --------------------------------------------------------------------------------------------------
# Seeds


def ask_seeds(folder: Folder) -> Iterator[str]:
    reports = folder.scored
    seeds = [report.seed for report in reports]
    if folder.is_record and folder.reports and len(set(seeds)) < rules.SEEDS:
        yield f"scored seeds in the logs: {len(set(seeds))}, a leaderboard row has {rules.SEEDS}"
    for seed in sorted({x for x in seeds if x is not None and seeds.count(x) > 1}):
        same = [name_of(report) for report in reports if report.seed == seed]
        yield f"seed {seed} in {', '.join(same)}: which one counts?"
    yield from ask_named_seeds(folder)
    yield from ask_settings(reports)
    yield from ask_mean(folder)


def ask_named_seeds(folder: Folder) -> Iterator[str]:
    for report in folder.reports:
        named = re.search(r"seed_?(\d+)", name_of(report))
        if named and report.seed is not None and int(named[1]) != report.seed:
            yield f"{name_of(report)}: seed {report.seed} in the log"
    claimed = (folder.submission or {}).get("seeds")
    seeds = {report.seed for report in (*folder.reports, *folder.others)} - {None}
    claimed = claimed if isinstance(claimed, (list, dict)) else []
    claimed = {int(x) for x in claimed if re.fullmatch("[0-9]{1,18}", str(x))}
    if seeds and claimed - seeds:
        missing = ", ".join(map(str, sorted(claimed - seeds)))
        yield f"submission.json: no log of seed {missing}"


RUN_SETTINGS = (
    r"seed|run_id|.*path.*|.*_dir|dir|.*files|logfile|scores|artifact|.*rank.*|.*log_every"
)


def ask_settings(reports: list[dialects.Report]) -> Iterator[str]:
    """Of runs of one configuration, all but names of files and seeds are the same."""
    for report in reports[1:]:
        first, own = reports[0].settings, report.settings
        both = [name for name in first.keys() & own.keys() if first[name] != own[name]]
        names = sorted(name for name in both if not re.fullmatch(RUN_SETTINGS, name))
        for name in names:
            values = f"{own[name]!r}, in {name_of(reports[0])} {first[name]!r}"
            yield f"{name_of(report)}: {name} is {values}: one configuration?"


def ask_mean(folder: Folder) -> Iterator[str]:
    """submission.json against the logs: each seed, mean, deviation."""
    yield from ask_results(folder)
    claimed, finals = folder.claim("val_bpb"), by_seed(folder.scored)
    if claimed is None or not finals:
        return
    label, values = chosen(folder, claimed)
    if values is None:
        alone = [name_of(x) for x in folder.scored if abs(x.final.bpb - claimed) < ROUNDING]
        found = f"that of {alone[0]} alone" if alone else "in no log"
        found += f": the logs' last scores have a mean of {mean(finals):.5f}"
        yield f"submission.json: val_bpb {claimed} is {found}"
        return
    if label:
        found = f"the mean of {label!r}, the last scores of the logs have {mean(finals):.5f}"
        yield f"submission.json: val_bpb {claimed} is {found}"
    yield from ask_deviation(folder.claim("val_bpb_std"), values)


def ask_results(folder: Folder) -> Iterator[str]:
    """A seed's score may stand in a log of its own, of a run that only scored."""
    for seed, result in folder.seed_results().items():
        value = result.get("val_bpb")
        of_seed = [x for x in (*folder.scored, *folder.others) if str(x.seed) == seed and x.final]
        scores = [score.bpb for report in of_seed for score in report.scores]
        if isinstance(value, float) and scores and min(abs(value - x) for x in scores) > ROUNDING:
            found = f"{name_of(of_seed[-1])} {of_seed[-1].final.bpb}"
            yield f"submission.json: seed {seed} has {value}, {found}"


def by_seed(reports: list[dialects.Report]) -> list[float]:
    """Last scores; a log that stands there twice counts once."""
    return list({(report.seed, report.final.bpb): report.final.bpb for report in reports}.values())


def chosen(folder: Folder, claimed: float) -> tuple[str, list[float] | None]:
    """Those scores whose mean is claimed, and their label if they are not the last; None if no
    label of the logs has that mean."""
    scoring = [report for report in folder.others if report.final]
    for reports in filter(None, (folder.scored, scoring)):
        if abs(mean(by_seed(reports)) - claimed) < 10 * ROUNDING:
            return "", by_seed(reports)
    reports = folder.scored
    for label in dict.fromkeys(score.label for score in reports[0].scores):
        found = [[s.bpb for s in report.scores if s.label == label][-1:] for report in reports]
        values = [value for x in found for value in x]
        if len(values) == len(reports) and abs(mean(values) - claimed) < 10 * ROUNDING:
            return label, values
    return "", None


def ask_deviation(claimed: float | None, values: list[float]) -> Iterator[str]:
    if claimed is None or len(values) < 2:
        return
    sample = deviation(values)
    population = sample * math.sqrt((len(values) - 1) / len(values))
    if abs(claimed - sample) <= max(ROUNDING, sample / 50):
        return
    is_population = abs(claimed - population) <= max(ROUNDING / 10, population / 50)
    found = "that of a population, the sample's" if is_population else "not the logs', which"
    yield f"submission.json: val_bpb_std {claimed} is {found} is {sample:.5f}"


# --------------------------------------------------------------------------------------------------
# Score


def ask_score(folder: Folder) -> Iterator[str]:
    for report in folder.scored:
        miscounted = list(ask_bytes(report))
        yield from miscounted or ask_train_loss(report, targets_of(folder, report))
        yield from ask_order(report)
    yield from ask_claimed_bytes(folder)
    claimed = folder.claim("val_bpb")
    if claimed is not None and claimed < 1:
        yield f"submission.json: val_bpb {claimed}: no accepted record was below 1.05"


def double_counting(ratio: float) -> str:
    """What a surplus of bytes by this ratio looks like."""
    if 1.15 < ratio < 1.2:
        return ", as when leading spaces are counted twice"
    return (
        ", as when CaseOps is scored without its byte sidecar" if abs(ratio - 1.0895) < 2e-3 else ""
    )


def is_known(targets: int) -> bool:
    """Of the whole split, in a vocabulary of rules.TARGETS; some drop the end, or count BOS."""
    return any(abs(targets / known - 1) < 2e-3 for known in rules.TARGETS.values())


def ask_bytes(report: dialects.Report) -> Iterator[str]:
    """Loss, score and targets imply the bytes of the text."""
    final, targets = report.final, report.fact("targets")
    if report.figure("official", True) is False or not targets or not final.bytes_per_token():
        return
    implied = targets * final.bytes_per_token()
    allowed, error = rules.OFFICIAL_BYTES, implied * final.bytes_error()
    if allowed.start - error <= implied <= allowed.stop + error:
        if not is_known(targets):
            yield f"{name_of(report)}: {targets:,} validation tokens: of no vocabulary known here"
        return
    if not is_known(targets):
        found = (
            f"{targets:,} validation tokens, by loss and score {implied / 1e6:.2f} million bytes"
        )
        yield f"{name_of(report)}: {found}: not the split of a vocabulary known here"
        return
    ratio = implied / rules.CANONICAL_BYTES
    true = f"{rules.CANONICAL_BYTES / 1e6:.2f} million of the split"
    found = f"implies {implied / 1e6:.2f} million bytes, {ratio:.4f} times the {true}"
    honest = f"with those it is {final.bpb * ratio:.4f}"
    yield f"{name_of(report)}: {final.bpb:.5f} bpb {found}{double_counting(ratio)}; {honest}"


def ask_claimed_bytes(folder: Folder) -> Iterator[str]:
    """As ask_bytes, where no log states both: of submission.json, by the vocabularies known."""
    loss, bpb = folder.claim("val_loss"), folder.claim("val_bpb")
    stated = any(r.final.loss and r.fact("targets") for r in folder.scored)
    if stated or not loss or not bpb:
        return
    per_token = loss / math.log(2) / bpb
    known = {name: rules.bytes_per_target(name) for name in rules.TARGETS}
    if any(abs(per_token / x - 1) < 1e-3 for x in known.values()):
        return
    listed = ", ".join(f"{name} {x:.4f}" for name, x in known.items())
    doubled = [n for n, x in known.items() if abs(per_token / x / rules.DOUBLE_COUNTED - 1) < 2e-3]
    more = (
        f"; {rules.DOUBLE_COUNTED} times {doubled[0]}'s{double_counting(rules.DOUBLE_COUNTED)}"
        if doubled
        else ""
    )
    found = f"{per_token:.4f} bytes a token ({listed}){more}"
    yield f"submission.json: val_loss and val_bpb imply {found}"


def targets_of(folder: Folder, report: dialects.Report) -> int | None:
    """As the log says, or else those of the one vocabulary that code and README name."""
    named = {x for x in rules.TARGETS if re.search(rf"{x}(?!\d)", folder.all_code + folder.readme)}
    of_only = rules.TARGETS[min(named)] if len(named) == 1 else None
    return report.fact("targets") or of_only


def ask_train_loss(report: dialects.Report, targets: int | None) -> Iterator[str]:
    """A score far below what training ended with, in the same unit."""
    steps = report.steps or 0
    late = [loss for step, loss in report.losses.items() if step >= LATE * steps]
    if not late or not targets or report.figure("official", True) is False:
        return
    per_token = rules.CANONICAL_BYTES / targets
    trained = mean(late) / math.log(2) / per_token
    lowest = min(score.bpb for score in report.scores)
    if lowest < 0.9 * trained:
        found = f"{mean(late):.3f} nats, {trained:.4f} bpb at {per_token:.3f} bytes a token"
        yield f"{name_of(report)}: score {lowest:.4f}, but training ended with {found}"


def ask_order(report: dialects.Report) -> Iterator[str]:
    """Scores that stand in an order which no honest model gives."""
    name, blocks, averaged = name_of(report), report.quantized, report.averaged
    sliding = report.last(r"^(?!.*ttt).*sliding")
    if sliding and blocks and sliding.bpb > blocks.bpb + 2e-3:
        found = f"{sliding.bpb:.4f}, without overlap {blocks.bpb:.4f}"
        yield f"{name}: sliding windows, with more context, score worse: {found}: sees its future?"
    if averaged and report.raw_bpb and averaged.bpb > report.raw_bpb + 2e-3:
        found = f"{averaged.bpb:.4f}, before {report.raw_bpb:.4f}"
        yield f"{name}: averaged weights score worse than the last ones: {found}: averaging off?"


# --------------------------------------------------------------------------------------------------
# Time, schedule, data


def ask_time(folder: Folder) -> Iterator[str]:
    if not folder.is_record:
        return
    limit = rules.SECONDS_LIMIT
    for report in folder.reports:
        name, trained = name_of(report), report.train_seconds
        if trained and trained > limit:
            step = (report.step_ms or 0) / 1000
            within = ", by less than a step" if trained - limit < step else ""
            yield f"{name}: trained {trained:.3f} s of {limit}: over{within}"
        elif report.figures is None:
            yield from ask_calibration(report)
        if (report.eval_seconds or 0) > limit:
            yield f"{name}: evaluated {report.eval_seconds:.1f} s of {limit}"
        if report.hardware and not rules.may_be_record_hardware(report.hardware):
            yield f"{name}: ran on {report.hardware}, a record on 8xH100"


def ask_calibration(report: dialects.Report) -> Iterator[str]:
    """Of Hessians behind the end of training."""
    seconds, trained = report.number("hessian_seconds"), report.train_seconds
    own = re.search(r"autoregressive|self-?gen|generat", report.text, re.I)
    if seconds and trained and trained + seconds > rules.SECONDS_LIMIT and not own:
        found = f"training stopped at {trained:.1f} s, Hessians took {seconds} s more"
        yield f"{name_of(report)}: {found}: training data read behind {rules.SECONDS_LIMIT} s?"


def ask_schedule(folder: Folder) -> Iterator[str]:
    for report in folder.reports:
        multiplier, name = report.lr_multiplier, name_of(report)
        steps, asked, warmdown = report.steps, report.iterations, report.fact("warmdown_steps")
        if multiplier is not None and multiplier > 0.5:
            found = f"{multiplier:g} of the learning rate at the end"
            yield f"{name}: {found}, step {steps} of {asked}: it never came down"
        elif multiplier is None and steps and asked and warmdown and steps < asked - warmdown:
            found = f"stopped at step {steps} of {asked}"
            yield f"{name}: {found}, before a warmdown of {warmdown} steps, if that counts steps"
        threshold = re.search(r"^Late QAT threshold: ([\d.]+)", report.text, re.M)
        if threshold and multiplier is not None and multiplier >= float(threshold[1]):
            found = (
                f"begins below {threshold[1]} of the learning rate, which ended at {multiplier:g}"
            )
            yield f"{name}: late QAT {found}: it never ran"


def ask_data(folder: Folder) -> Iterator[str]:
    for report in folder.reports:
        if report.fact("shards") == 1 and report.figure("official", True):
            yield f"{name_of(report)}: one shard of training data"
    for name, source in folder.code.items():
        first = r"sorted\(.*\.bin.*\n[^\n]*\bfiles?\[0\]"
        if re.search(first, source):
            yield f"{name}: takes the first of the sorted shards only"
        held = re.search(r"[\"']--val-docs[\"'][^)]*default=([\d_]+)", source)
        if held and int(held[1]) < rules.OFFICIAL_DOCUMENTS:
            count = int(held[1])
            yield (
                f"{name}: --val-docs is {count:,} unless given: validation documents {count:,} to "
                f"{rules.OFFICIAL_DOCUMENTS:,} would stand in the training shards"
            )


# --------------------------------------------------------------------------------------------------
# Quantization, learning while scoring, significance


def ask_quantization(folder: Folder) -> Iterator[str]:
    said = json.dumps(folder.submission or {}) + folder.readme
    logged = "\n".join(report.text for report in folder.reports)
    claims = re.search(r"\bGPTQ\b(?!-lite)", said) and not re.search("no GPTQ|without GPTQ", said)
    if claims and folder.reports and not re.search("hessian|gptq", logged, re.I):
        yield "GPTQ is claimed, no log shows that Hessians were collected"
    for name, source in folder.code.items():
        body = re.search(r"^def \w*hessian\w*\(.*?(?=^\S)", source, re.M | re.S)
        narrow = body and re.search(r"isinstance\(\w+, (CastedLinear)\)", body[0])
        if narrow and re.search(r"\bfla\b|FLA", folder.all_code) and folder_collects(folder):
            found = ", ".join(sorted({str(r.fact("hessians")) for r in folder.reports}))
            yield f"{name}: Hessians of CastedLinear only ({found} in logs), not of fla's layers"


def folder_collects(folder: Folder) -> bool:
    return any(report.fact("hessians") for report in folder.reports)


def ask_learning(folder: Folder) -> Iterator[str]:
    for report in folder.reports:
        name = name_of(report)
        if re.search(r"^pre_?quant_?ttt:(?:start|epoch)", report.text, re.M | re.I):
            yield f"{name}: prequant_ttt: learns from validation text before that is scored?"
        on = [key for key in report.settings if re.search("slot|etlb|ngram_cache", key)]
        for key in on:
            if key.endswith("enabled") and report.settings[key] in ("True", "1"):
                yield f"{name}: {key}: is what it predicts with fixed before the target is seen?"


def ask_significance(folder: Folder, against: list[str]) -> Iterator[str]:
    if not against or not folder.scored:
        return
    ours = compare.read_side([str(report.path) for report in folder.scored])
    theirs = compare.read_side(against)
    lines = compare.lines_of(ours, theirs)
    yield from (line.strip() for line in lines if re.match("  of a .*: no: |no test", line))


# --------------------------------------------------------------------------------------------------
# All of it


GROUPS: dict[str, Callable[[Folder], Iterator[str]]] = {
    "files": ask_files,
    "size": ask_size,
    "code": ask_code,
    "seeds": ask_seeds,
    "score": ask_score,
    "time": ask_time,
    "schedule": ask_schedule,
    "data": ask_data,
    "quantization": ask_quantization,
    "learning": ask_learning,
}


def unseen(folder: Folder, against: list[str]) -> Iterator[str]:
    """What these files do not show, or this tool cannot tell."""
    if folder.scored and not any(report.final.loss for report in folder.scored):
        yield "the bytes behind the score: no log states its nats"
    elif folder.scored and not all(report.fact("targets") for report in folder.scored):
        yield "the bytes behind the score: not every log states its targets"
    if folder.reports and not any(r.lr_multiplier is not None for r in folder.reports):
        yield "whether the learning rate came down: no log states it"
    if folder.reports and not all(r.eval_seconds for r in folder.reports):
        yield "how long evaluation took: not every log states it"
    if folder.reports and not all(r.fact("shards") for r in folder.reports):
        yield "how many shards were read: not every log states it"
    if folder_collects(folder) and not any(r.figures for r in folder.reports):
        yield "of how many matrices GPTQ should have Hessians"
    if any(re.search(r"\bexec\s*\(", source) for source in folder.code.values()):
        yield "what code does that is made while it runs"
    if not against:
        yield "significance: no record to compare with (--against)"
    yield from CANNOT_SEE


def merged(questions: list[str]) -> list[str]:
    """Those that ask the same of several files as one."""
    files: dict[str, list[str]] = {}
    for question in questions:
        file, _, rest = question.partition(": ")
        files.setdefault(rest or question, []).append(file if rest else "")
    return [f"{', '.join(dict.fromkeys(x))}: {q}" if x[0] else q for q, x in files.items()]


def lines_of(path: Path, against: list[str]) -> tuple[list[str], bool]:
    """What to print, and whether there is something to ask. Raises: OSError if it is no folder,
    ValueError if there is nothing to compare with."""
    folder = read(path)
    groups = {name: list(ask(folder)) for name, ask in GROUPS.items()}
    groups["significance"] = list(ask_significance(folder, against))
    lines = [f"{name}: {line}" for name, found in groups.items() for line in merged(found)]
    summary = f"{path}: {len(lines)} to ask" if lines else f"{path}: nothing to ask"
    track = (
        "" if folder.is_record else "; not in the record track: time and number of seeds left out"
    )
    closing = [f"cannot see: {line}" for line in unseen(folder, against)]
    return [f"{summary}{track}", *lines, *closing], bool(lines)
