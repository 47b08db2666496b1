"""bundle: pack the source files that a run needs, and the parameters without the seed, into train_gpt.py."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from stages.bundle import importer_template
from stages.bundle.params import Params
from stages.common.stage import Run, Stage

PACKAGE = importer_template.ENTRY.partition(".")[0]
RESERVE_STEP = 1000  # bytes; an error message proposes a reserve that is a multiple of this
STAGE = Stage(
    name="bundle",
    summary="Pack the modules of stages/ that a run needs, and the parameters, into one runnable file.",
    params=Params,
    reads={"source": Path("stages")},
    writes=("train_gpt.py", "metrics.json"),
)


def main(run: Run[Params]) -> None:
    """Collect and strip the sources, compress them, write train_gpt.py."""
    source = run.path("source").absolute()
    if source.name != PACKAGE:
        raise ValueError(
            f"--source {source} is not a folder called {PACKAGE}: the modules are bundled under that name"
        )
    if run.output.resolve().is_relative_to(source.resolve()):
        raise ValueError(
            f"--output {run.arguments.output} is inside the source that is packed;"
            f" name a folder outside {source}"
        )

    sources = importer_template.collect_sources(source.parent)
    parameters = embedded_parameters(run.params)
    file = importer_template.render_bundle(sources, parameters, run.params.bundle.brotli_quality)
    stripped_size = sum(map(len, sources.values()))
    run.logger.log(
        f"bundle: {len(sources)} modules, {stripped_size:,} characters stripped, {len(file):,} bytes packed"
    )

    require_within_reserve(len(file), run.params.pack.code_reserve_bytes)
    run.write_bytes("train_gpt.py", file)
    run.write_json("metrics.json", {"bytes_code": len(file), "modules": len(sources)})


def require_within_reserve(size: int, reserve: int) -> None:
    """Raise ValueError if the code is larger than the part of the byte budget that pack keeps for it.

    The message names the number to set.
    """
    if size > reserve:
        enough = -(-size // RESERVE_STEP) * RESERVE_STEP
        raise ValueError(
            f"train_gpt.py has {size:,} bytes, more than the {reserve:,} of pack.code_reserve_bytes;"
            f" set that to {enough}, and the model is packed again"
        )


def embedded_parameters(params: Params) -> dict[str, Any]:
    """Return the parameters that train_gpt.py contains: all but the section `bundle`."""
    raw = asdict(params)
    del raw["bundle"]
    return raw
