"""The competition's numbers, each in this one place for all tools.

train_gpt.py has its own, since the tools prove it from outside.
"""

SIZE_LIMIT = 16_000_000  # bytes, artifact and code
SECONDS_LIMIT = 600  # for training and for evaluation, each
OFFICIAL_DOCUMENTS, OFFICIAL_BYTES = 50_000, range(151_020_000, 151_090_001)
# of the official split, by vocabulary: how many targets the public logs score
TARGETS = {
    "sp1024": 62_021_632,
    "sp4096": 45_508_608,
    "sp8192": 40_540_160,
    "sp8192 CaseOps": 47_851_520,
    "byte260": 151_130_112,
}
CANONICAL_BYTES = 151_080_878  # of the official split, as decoded
# what a byte table makes of it that counts leading spaces twice and byte tokens by their spelling;
# counting the spaces alone twice makes it 1.167
DOUBLE_COUNTED = 1.177

RECORD_NATS, RECORD_P = 0.005, 0.01  # a record is better by more than so much, at p below
SEEDS = 3  # of which a leaderboard row is the mean
RECORD_TRACK, OTHER_TRACK = "10min_16mb", "non_record_16mb"  # folders: records/track_<name>
RECORD_RANKS, RECORD_GPU = "8", "H100"


def may_be_record_hardware(name: str) -> bool:
    """Of a name as 8xNVIDIA H100 80GB HBM3; a ? leaves open what a log does not say."""
    ranks, _, gpu = name.partition("x")
    return ranks in (RECORD_RANKS, "?") and (gpu == "?" or RECORD_GPU in gpu)


def bytes_per_target(vocabulary: str) -> float:
    return CANONICAL_BYTES / TARGETS[vocabulary]
