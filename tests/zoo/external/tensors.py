"""A lawful scorer that computes with torch, in float32 or bfloat16."""

import torch

from .bigram import PRIOR_COUNT, VOCAB_SIZE

torch.set_num_threads(1)


class TensorBigram:
    """Tensors come out of it; what it shows is rounded to its precision."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.precision = str(dtype).removeprefix("torch.")
        self.unigram_counts = torch.ones(VOCAB_SIZE)
        self.bigram_counts: dict[int, torch.Tensor] = {}
        self.previous = -1

    def predict(self) -> torch.Tensor:
        counts = self.unigram_counts * (PRIOR_COUNT / self.unigram_counts.sum())
        counts = counts + self.bigram_counts.get(self.previous, torch.zeros(()))
        return torch.log_softmax(counts.log(), dim=0).to(self.dtype)

    def observe(self, token: int) -> None:
        counts = self.bigram_counts.setdefault(self.previous, torch.zeros(VOCAB_SIZE))
        counts[token] += 1
        self.unigram_counts[token] += 1
        self.previous = token

    def fork(self) -> "TensorBigram":
        copy = TensorBigram(self.dtype)
        copy.unigram_counts = self.unigram_counts.clone()
        copy.bigram_counts = {token: counts.clone() for token, counts in self.bigram_counts.items()}
        copy.previous = self.previous
        return copy

    def score_stream(self, tokens: object) -> torch.Tensor:
        losses = []
        for token in map(int, tokens):  # type: ignore[call-overload]
            if self.previous >= 0:
                losses.append(-self.predict()[token])
            self.observe(token)
        return torch.stack(losses) if losses else torch.empty(0, dtype=self.dtype)


def make(n_targets: int) -> TensorBigram:
    return TensorBigram(torch.float32)


def make_bfloat16(n_targets: int) -> TensorBigram:
    return TensorBigram(torch.bfloat16)
