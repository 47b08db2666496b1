"""A lawful scorer's module that prints when it is imported, and reads its standard input."""

import sys

from .bigram import BigramModel

print("Traceback: not really")
sys.stdin.read()
print('{"vocab_size": 5}', file=sys.stderr)


def make(n_targets: int) -> BigramModel:
    return BigramModel()
