"""bundle: the counted code, one file made from the sources that the run needs and the parameters without the seed."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from stages.bundle import importer_template
from stages.bundle.params import Params
from stages.common import command

PACKAGE = importer_template.ENTRY.partition(".")[0]
RESERVE_STEP = 1000  # bytes; the reserve that a message proposes is a multiple
STAGE = command.Stage(
    name="bundle",
    summary="Packs the needed modules of stages/ and the parameters into one file that runs.",
    params=Params,
    reads={"source": Path("stages")},
    writes=("train_gpt.py", "metrics.json"),
)


def main(run: command.Run[Params]) -> None:
    """Strip, compress, write; the source is only read."""
    source = run.path("source").absolute()
    if source.name != PACKAGE:
        raise ValueError(
            f"--source {source} is not a folder called {PACKAGE}: the modules are carried under that name"
        )
    if run.output.resolve().is_relative_to(source.resolve()):
        raise ValueError(
            f"--output {run.arguments.output} lies in the source that is packed; name a folder outside {source}"
        )
    carried = importer_template.sources(source.parent)
    file = importer_template.render(carried, embedded(run.params), run.params.bundle.brotli_quality)
    run.report.log(
        f"bundle: {len(carried)} modules, {sum(map(len, carried.values())):,} characters stripped, {len(file):,} bytes packed"
    )
    require_room(len(file), run.params.pack.code_reserve_bytes)
    run.write_bytes("train_gpt.py", file)
    run.write_json("metrics.json", {"bytes_code": len(file), "modules": len(carried)})


def require_room(size: int, reserve: int) -> None:
    """A ValueError that names the number to set when the code is larger than what pack keeps for it of the byte budget."""
    if size > reserve:
        enough = -(-size // RESERVE_STEP) * RESERVE_STEP
        raise ValueError(
            f"train_gpt.py has {size:,} bytes, more than the {reserve:,} of pack.code_reserve_bytes;"
            f" set that to {enough}, and the model is packed again"
        )


def embedded(params: Params) -> dict[str, Any]:
    """The parameters that train_gpt.py carries: of the submission only the scorer's name, of the bundle none."""
    raw = asdict(params)
    del raw["bundle"]
    return raw | {"submission": {"scorer": params.submission.scorer}}


if __name__ == "__main__":
    command.launch(STAGE, main)
