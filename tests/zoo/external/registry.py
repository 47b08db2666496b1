"""List of the external scorers: how each is audited, and what must come of it."""

from dataclasses import dataclass

ALONE = ("--window", "20", "--targets", "60000")  # for score_stream alone: short probes, the whole stream
SOON = ("--answer-seconds", "2")
CERTIFIED = "B17 ledger equals certified score"
CERTIFIED_SUMS = "B17 certified sums"
TAILS = "B7 uniform ids after prefixes"
PREFIXES = "B1 prefixes in fresh processes"
PROTOCOL = "B6 protocol"
COMPLETE = "B6 coverage"


@dataclass(frozen=True)
class ExternalScorer:
    """One scorer of this package."""

    name: str
    factory: str  # module:function, in this package
    options: tuple[str, ...] = ()  # of the command
    exit_code: int = 0
    failed: str = ""  # check that must fail, for exit code 1; others may fail too
    message: str = ""  # part of the one line that is printed, for exit code 2
    ledger: str = (
        ""  # function of the module whose scorer makes the claimed ledger; otherwise none is claimed
    )


def convicted(name: str, factory: str, failed: str, *options: str, ledger: str = "") -> ExternalScorer:
    """Describe a scorer that must fail a check."""
    return ExternalScorer(name, factory, options, exit_code=1, failed=failed, ledger=ledger)


def not_audited(name: str, factory: str, message: str, *options: str) -> ExternalScorer:
    """Describe a scorer that cannot be audited."""
    return ExternalScorer(name, factory, options, exit_code=2, message=message)


def passed(name: str, factory: str, *options: str) -> ExternalScorer:
    """Describe a scorer that must pass."""
    return ExternalScorer(name, factory, options)


CHEATS = (
    # Answers that one process leaves for another.
    convicted("answers in files", "channels:files", CERTIFIED),
    convicted("answers from a daemon's sockets", "channels:sockets", CERTIFIED),
    convicted("answers in shared memory", "channels:shared_memory", CERTIFIED),
    convicted("answers in a message queue", "channels:queues", CERTIFIED),
    convicted("answers in the page cache", "channels:page_cache", CERTIFIED),
    convicted("stream named by other processes", "channels:environment", CERTIFIED),
    convicted("stream's file on disk", "channels:disk", CERTIFIED),
    convicted("stream from the network", "channels:network", CERTIFIED),
    convicted("table of answers in a class", "selective:table_of_answers", PREFIXES, *ALONE),
    convicted(
        "locks on a file, side by side",
        "selective:locks_between_processes",
        PREFIXES,
        *ALONE,
        ledger="knows_parity",
    ),
    # Lawful most of the time.
    convicted("lawful at first", "selective:lawful_at_first", CERTIFIED, ledger="lawful_at_first"),
    convicted(
        "lawful at first, scores alone",
        "selective:alone_lawful_at_first",
        PREFIXES,
        *ALONE,
        ledger="alone_lawful_at_first",
    ),
    convicted("two passes in the whole call", "selective:whole_call", CERTIFIED),
    convicted("two passes in the whole call, scores alone", "selective:alone_whole_call", PREFIXES, *ALONE),
    convicted("target gate at one in 200", "selective:rare_gate", CERTIFIED, ledger="rare_gate"),
    convicted(
        "target gate far from the beginning, scores alone",
        "selective:deep_gate",
        TAILS,
        *ALONE,
    ),
    convicted("sum of 1.5 at one in 300", "selective:rare_sum", CERTIFIED_SUMS),
    convicted("lowered by 5e-6 nats", "selective:lowered", CERTIFIED, ledger="lowered"),
    convicted("lowered by 0.0046 nats in bfloat16", "selective:lowered_coarsely", CERTIFIED),
    convicted("lawful once it was asked to predict", "selective:watched", CERTIFIED),
    not_audited("refuses to be certified", "selective:unwilling", "raised MemoryError"),
    convicted("fork returns itself", "selective:shared_forks", "B2 own-token independence"),
    convicted("forks share counts", "selective:shared_counts", "B2 own-token independence"),
    # Reach for the audit.
    convicted("patches the audit", "tampering:patches_the_audit", CERTIFIED),
    convicted("patches its server", "tampering:patches_the_server", CERTIFIED),
    convicted("patches NumPy", "tampering:patches_arrays", CERTIFIED),
    not_audited("own report, exit status 0", "tampering:reports_and_leaves", "ended with exit code 0"),
    not_audited("own report, SystemExit", "tampering:reports_and_exits", "raised SystemExit: 0"),
    not_audited("own report, later", "tampering:leaves_in_predict", "ended with exit code 0"),
    not_audited("own report, SystemExit later", "tampering:exits_in_predict", "raised SystemExit: 0"),
    not_audited("kills everybody", "tampering:kills_everybody", ""),
    convicted("report after the audit", "tampering:reports_later", CERTIFIED),
    # Write into the pipe.
    convicted("answers ahead", "tampering:answers_ahead", CERTIFIED),
    convicted("answers too short", "tampering:answers_too_short", PROTOCOL),
    convicted("answers too long", "tampering:answers_too_long", PROTOCOL),
    not_audited("garbage in the pipe", "tampering:writes_garbage", "status 238"),
    not_audited("flood of the pipe", "tampering:floods_pipe", "status 255", *SOON),
    convicted("flood of zeros", "tampering:floods_pipe_with_zeros", PROTOCOL, *SOON),
    not_audited("reads requests", "tampering:reads_requests", "ended with exit code 1"),
    not_audited("forges an error", "tampering:forges_an_error", "raised nothing 51 passed"),
    convicted("forges a failure", "tampering:forges_a_failure", PROTOCOL),
    not_audited("description without end", "tampering:describes_itself_in_depth", "described itself"),
    not_audited("description of other types", "tampering:describes_itself_in_numbers", "described itself"),
)

LAWFUL = (
    passed("float32", "odd:float32"),
    passed("float64", "odd:float64"),
    passed("without vocab_size and score_stream", "odd:without_size"),
    passed("impossible ids", "odd:never_pads"),
    passed("round-off by batch", "odd:rounds_by_batch"),
    passed("each document by itself", "odd:by_document"),
    passed("scores alone", "odd:alone", *ALONE),
    passed("prints much", "odd:talkative"),
    passed("threads", "odd:threaded"),
    passed("temporary files", "odd:buffered"),
    passed("multiprocessing", "odd:processes"),
    passed("slots, lists, NumPy's integers", "odd:slots"),
    passed("flood of output", "tampering:floods_output"),
    passed("prints at import", "prints_at_import:make"),
    passed("tensors in bfloat16", "tensors:make_bfloat16"),
)

FAILING = (
    not_audited("module that cannot be imported", "raises_at_import:make", "raised ModuleNotFoundError"),
    not_audited("module that leaves", "exits_at_import:make", "ended with exit code 0"),
    not_audited("factory returns None", "failing:returns_none", "lacks predict, observe, fork"),
    not_audited("factory hangs", "failing:hangs_in_factory", "did not answer within 2 seconds", *SOON),
    not_audited("unknown precision", "failing:declares_nonsense", "precision 'exact' is not known"),
    not_audited("another vocabulary", "failing:other_size", "they do not belong together"),
    not_audited("crash", "failing:crashes", "was killed by signal 11"),
    not_audited("abort", "failing:isAborted", "was killed by signal 6"),
    not_audited("killed", "failing:isKilled", "perhaps out of memory"),
    not_audited("exit status 3", "failing:leavesWithThree", "ended with exit code 3"),
    not_audited("out of memory", "failing:runsOutOfMemory", "MemoryError"),
    not_audited("hangs", "failing:hangsInPredict", "did not answer within 2 seconds", *SOON),
    not_audited("leaves processes", "failing:leavesProcesses", "it left processes"),
    convicted("NaN", "failing:returnsNan", CERTIFIED_SUMS),
    convicted("too few probabilities", "failing:returnsTooFew", PROTOCOL),
    convicted("a loss too few", "failing:losesOne", PROTOCOL),
    convicted("a loss is NaN", "failing:scoresNan", COMPLETE),
    convicted("a loss too few, scores alone", "failing:aloneLosesOne", PROTOCOL, *ALONE),
    convicted("losses are NaN, scores alone", "failing:aloneScoresNan", COMPLETE, *ALONE),
)
