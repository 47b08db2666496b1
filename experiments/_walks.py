"""Runs four walks through one source tree and records the Python stack at their end points.

    python -P experiments/_walks.py FOLDER

The working directory is the tree, which is also first on PYTHONPATH; so `stages` is that tree's, whatever
tree this file is in. FOLDER gets a made-up text, the outputs of tiny stages, and walks.json. Everything
runs in this process. Each part of a walk runs twice, the second time under sys.setprofile, so that numba's
compilation is not recorded.
"""

import functools
import importlib
import importlib.util
import inspect
import itertools
import json
import sys
import threading
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple

from safetensors.torch import load_file

from stages.common import config
from stages.common.progress import Logger
from stages.common.stage import launch

VOCAB = 300
SETTINGS = (
    *("tokenize.source=files", "tokenize.train_glob=train.txt", "tokenize.val_glob=val.txt"),
    *(f"tokenize.vocab_size={VOCAB}", f"model.vocab_size={VOCAB}", "model.context=32", "model.width=32"),
    *("model.layers=3", "model.hidden=64", "model.rope_dims=4", "train.steps=2", "train.batch_tokens=64"),
    *("train.micro_batch_tokens=64", "calibrate.tokens=128", "calibrate.importance_tokens=64"),
    *("calibrate.micro_batch_tokens=64", "sliding_eval.window=32", "sliding_eval.stride=16"),
    *("sliding_eval.batch_windows=4", "sliding_eval.chunk=128", "ttt_eval.chunk=128"),
    *("ttt_eval.batch_tokens=64", "ttt_eval.epochs=1", "parallel.threads=1"),
)


class Part(NamedTuple):
    """Part of a walk: a function that begins it, and named points that it must reach.

    A function is written FILE:NAME, the file below `stages` and the qualified name. A point is a
    function, with two additions: before it "FUNCTION ... " says that only stacks with this other
    function count, and after it " > NAME" is a compiled function that it calls, which has no Python
    frame. Several spellings belong to different trees; the first one of a list that is reached counts.
    """

    entry: tuple[str, ...]
    ends: dict[str, tuple[str, ...]]
    action: str  # a method of Walker
    counts_files: bool = True  # False: the files in which a function ran say nothing about this walk


LEVEL_CODER = "pack/entropy/level_coder.py:_code_matrix > _code_rows"
ENCODE_LEVELS = "pack/entropy/codecs.py:_encode_adaptive"
DECODE_LEVELS = "pack/entropy/codecs.py:_decode_adaptive"
ENCODE_SERIES = "pack/entropy/codecs.py:_encode_series"

# For another tree, add its spellings.
WALKS = {
    "(a) document to bits per byte": (
        Part(
            ("tokenize/__main__.py:main", "tokenize/stage.py:main"),
            {
                "document read": ("tokenize/files.py:_decode",),
                "document encoded": ("tokenize/encode.py:check_bytes",),
                "tokens written": ("tokenize/writer.py:SideWriter._write",),
            },
            "tokenize",
        ),
        Part(
            ("sliding_eval/__main__.py:main", "sliding_eval/stage.py:main"),
            {
                "bytes counted": ("common/bpb.py:target_bytes",),
                "loss of targets": ("scoring/queries.py:score_targets",),
                "bits per byte": ("common/bpb.py:bits_per_byte",),
            },
            "sliding_eval",
        ),
    ),
    "(b) matrix to bytes and back": (
        Part(
            ("pack/artifact.py:pack",),
            {
                "levels searched": ("pack/quantise/trellis_quantiser.py:quantise_matrix",),
                "levels encoded": (f"{ENCODE_LEVELS} ... {LEVEL_CODER}",),
                "steps encoded": (f"{ENCODE_SERIES} ... {LEVEL_CODER}",),
                "file written": ("pack/file/container.py:serialise",),
            },
            "pack",
        ),
        Part(
            ("pack/artifact.py:unpack",),
            {
                "levels decoded": (f"{DECODE_LEVELS} ... {LEVEL_CODER}",),
                "dequantised": (
                    "pack/quantise/trellis_quantiser.py:dequantise",
                    "pack/forms.py:TrellisForm.dequantise",
                ),
            },
            "unpack",
        ),
    ),
    "(c) target through training, tilt and mixture": (
        Part(
            ("scoring/evaluate.py:score",),
            {
                "path logits": ("scoring/byte_tree_logits.py:DeviceByteTrees.path_logits",),
                "tilt": (
                    "ttt_eval/ngram/scorer.py:TiltScorer._score > score_and_adapt",
                    "ttt_eval/ngram/tilt.py:NgramTilt.score_and_learn_ > _score_and_learn",
                ),
                "mixture": ("ttt_eval/bytemix/mixer.py:ByteMixer.score_and_learn > _score_and_learn",),
            },
            "ttt_eval",
        ),
    ),
    "(d) parameter to its use": (
        Part(
            ("common/config.py:load",),
            {
                "params.yaml read": ("common/config.py:read_sections",),
                "value checked": ("common/config.py:_scalar",),
            },
            "load_parameters",
        ),
        Part(
            ("common/stage.py:launch",),
            {
                "tilt built": (
                    "ttt_eval/ngram/scorer.py:TiltScorer.__init__",
                    "ttt_eval/ngram/tilt.py:NgramTilt.__init__",
                )
            },
            "ttt_eval",
            counts_files=False,  # it is the whole evaluation
        ),
    ),
}


class EndPoint(NamedTuple):
    """A point that a part must reach, parsed."""

    spelling: str
    via: str  # function that must be on the stack; empty: none
    compiled: str  # function without a frame; empty: none


class Recorder:
    """Stacks at a part's end points, and files in which functions ran, between its entry's call and return.

    A stack has the frames of functions in the tree's stages, from the entry on. Work on a thread has
    the frames of the call that submitted it, and then the thread's own.
    """

    def __init__(self, part: Part, stages_folder: Path) -> None:
        self.part = part
        self.stages_folder = f"{stages_folder}/"
        self.local = threading.local()  # `submitter`: the stack that submitted this thread's work
        self.open_entries = 0
        self.files: set[str] = set()
        self.stacks: dict[str, list[str]] = {}  # by spelling of the end point, the deepest
        self.ends: dict[str, list[EndPoint]] = defaultdict(list)  # by function
        for spelling in itertools.chain(*part.ends.values()):
            function, _, compiled = spelling.rpartition(" ... ")[2].partition(" > ")
            self.ends[function].append(EndPoint(spelling, spelling.rpartition(" ... ")[0], compiled))
        self.name_of = functools.cache(self._name_of)

    def _name_of(self, code: CodeType) -> str:
        """FILE:NAME of a function of the stages; empty for all other code."""
        if not code.co_filename.startswith(self.stages_folder) or not code.co_flags & inspect.CO_OPTIMIZED:
            return ""  # the body of a module or class is not optimised
        if code.co_name in ("<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>"):
            return ""
        return f"{code.co_filename.removeprefix(self.stages_folder)}:{code.co_qualname}"

    def stack(self, frame: FrameType | None) -> list[str]:
        """The stack of a frame, outermost function first."""
        own = []
        while frame is not None:
            if name := self.name_of(frame.f_code):
                own.append(name)
            frame = frame.f_back
        return [*getattr(self.local, "submitter", []), *reversed(own)]

    def profile(self, frame: FrameType, event: str, _argument: object) -> None:
        """For sys.setprofile: record calls."""
        if event not in ("call", "return"):
            return
        name = self.name_of(frame.f_code)
        if not name:
            return
        if name in self.part.entry:
            self.open_entries += 1 if event == "call" else -1
        if event == "return" or self.open_entries == 0:
            return

        file = name.partition(":")[0]
        self.files.add(file)
        for end in self.ends.get(name, ()):
            stack = self.stack(frame)
            entries = [depth for depth, function in enumerate(stack) if function in self.part.entry]
            if not entries or (end.via and end.via not in stack):
                continue  # without an entry: on a thread that this part did not start
            stack = stack[entries[0] :] + ([f"{file}:{end.compiled}"] if end.compiled else [])
            if len(stack) > len(self.stacks.get(end.spelling, [])):
                self.stacks[end.spelling] = stack

    def run(self, action: Callable[[], object]) -> dict[str, Any]:
        """Record `action`; returns the part for walks.json."""
        submit = ThreadPoolExecutor.submit

        def submit_with_stack(pool: Any, function: Any, /, *arguments: Any, **named: Any) -> Any:
            submitter = self.stack(sys._getframe(1))

            def call() -> Any:
                self.local.submitter = submitter
                return function(*arguments, **named)

            return submit(pool, call)

        ThreadPoolExecutor.submit = submit_with_stack  # type: ignore[method-assign]
        threading.setprofile(self.profile)
        sys.setprofile(self.profile)
        try:
            action()
        finally:
            sys.setprofile(None)
            threading.setprofile(None)
            ThreadPoolExecutor.submit = submit  # type: ignore[method-assign]

        # Every end must have been reached, by one of its spellings.
        stacks = {}
        for end, spellings in self.part.ends.items():
            reached = [self.stacks[spelling] for spelling in spellings if spelling in self.stacks]
            if not reached:
                raise ValueError(f"{' or '.join(spellings)} was not reached from {self.part.entry}")
            stacks[end] = reached[0]
        return {"stacks": stacks, "files": sorted(self.files) if self.part.counts_files else []}


class Walker:
    """Runs stages of the tree in the working directory on tiny inputs; outputs go below `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "12", "cafés"]
        text = folder / "text"
        text.mkdir(parents=True, exist_ok=True)
        for name, step in (("train", 7), ("val", 5)):
            chosen = [words[i * i * step % len(words)] + "s" * (i % 3) for i in range(1500)]
            (text / f"{name}.txt").write_text(" ".join(chosen), encoding="utf-8")

    def stage(self, name: str, **inputs: Path) -> None:
        """Run a stage in this process."""
        has_stage = importlib.util.find_spec(f"stages.{name}.stage") is not None
        module = importlib.import_module(f"stages.{name}.stage" if has_stage else f"stages.{name}.__main__")
        words = ["--output", str(self.folder / name)]
        for option, path in inputs.items():
            words += [f"--{option}", str(path)]
        for setting in SETTINGS:
            words += ["--set", setting]
        launch(module.STAGE, module.main, words)

    def tokenize(self) -> None:
        self.stage("tokenize", text=self.folder / "text")

    def train(self) -> None:
        self.stage("train", train=self.folder / "tokenize/train")

    def calibrate(self) -> None:
        model = self.folder / "train/model.safetensors"
        self.stage("calibrate", model=model, train=self.folder / "tokenize/train")

    def _parameters(self, stage: str) -> Any:
        schema = importlib.import_module(f"stages.{stage}.params").Params
        return config.load(Path("params.yaml"), schema, list(SETTINGS))

    def load_parameters(self) -> None:
        self._parameters("ttt_eval")

    def pack(self) -> None:
        """Pack in this process, without the one that encodes."""
        artifact: Any = importlib.import_module("stages.pack.artifact")
        params = self._parameters("pack")
        arguments = {
            "state": load_file(self.folder / "train/model.safetensors"),
            "calibration": load_file(self.folder / "calibrate/hessians.safetensors"),
            "model_params": params.model,
            "pack_params": params.pack,
            "logger": Logger(is_main=False),
        }
        if "encoder" in inspect.signature(artifact.pack).parameters:
            encoders = importlib.import_module("stages.pack.file.stream_encoder")
            arguments["encoder"] = encoders.InProcessEncoder()
        (self.folder / "model.bin").write_bytes(artifact.pack(**arguments).blob)

    def unpack(self) -> None:
        importlib.import_module("stages.pack.artifact").unpack((self.folder / "model.bin").read_bytes())

    def _evaluate(self, name: str, **inputs: Path) -> None:
        tokenized = self.folder / "tokenize"
        inputs |= {"model": self.folder / "model.bin", "val": tokenized / "val"}
        self.stage(name, tokenizer=tokenized / "tokenizer.model", **inputs)

    def sliding_eval(self) -> None:
        self._evaluate("sliding_eval")

    def ttt_eval(self) -> None:
        self._evaluate("ttt_eval", sliding=self.folder / "sliding_eval/nll.npy")


def main() -> None:
    """Make the inputs of all parts, then record each part."""
    folder = Path(sys.argv[1])
    walker = Walker(folder)
    for action in ("tokenize", "train", "calibrate", "pack", "unpack", "sliding_eval", "ttt_eval"):
        getattr(walker, action)()

    results = {}
    for name, parts in WALKS.items():
        recorded = []
        for part in parts:
            recorder = Recorder(part, Path.cwd() / "stages")
            recorded.append(recorder.run(getattr(walker, part.action)))
        results[name] = recorded
    (folder / "walks.json").write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    main()
