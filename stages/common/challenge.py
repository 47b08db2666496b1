"""Constants of OpenAI's Parameter Golf challenge: budgets, validation set, and the rule for a new record.

Budgets that a user may change are parameters (params.yaml); the values here are the challenge's
own, for defaults of commands, for checks of other people's records, and for scaling a measured run
to the challenge's validation set.
"""

MAX_ARTIFACT_BYTES = 16_000_000  # code and weights together (README of the challenge)
MAX_TRAINING_SECONDS = 600.0  # on GPUS GPUs; measuring Hessians on training data counts (#1868)
MAX_EVALUATION_SECONDS = 600.0  # of one evaluation process, from its start
GPUS = 8  # H100 GPUs of one machine; one process for each

VALIDATION_BYTES = 151_078_222  # UTF-8 bytes of the validation text (logs of #1493)
VALIDATION_TARGETS = 40_540_160  # with the SP8192 tokenizer, as accepted logs count them (#1493)
VALIDATION_DOCUMENTS = 50_000
VALIDATION_TOKENS = 40_540_803  # with the SP8192 tokenizer, before the cut to whole windows of 2,048
VALIDATION_TEXT_BYTES = 151_080_891  # UTF-8 bytes of all documents, before that cut
CASEOPS_VALIDATION_TARGETS = 47_851_520  # with the CaseOps tokenizer of 8,192 ids (#1736)
CASEOPS_VALIDATION_BYTES = 151_074_309  # of the text that these targets restore

# A new record must be better than the best one so far by this many nats, at this one-sided p-value.
# The rule does not say if the nats are per token or per byte; both readings are in use.
MIN_RECORD_GAIN_NATS = 0.005
RECORD_P_VALUE = 0.01
MIN_RECORD_SEEDS = 3
