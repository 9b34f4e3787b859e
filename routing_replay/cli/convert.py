"""`routing-replay convert`: import other tools' files, or export to them."""

from __future__ import annotations

import argparse
import json

from ..errors import ConfigError
from ..routes.parts import open_table
from .model import add_model, read_shape

KINDS = ("rollout", "sglang")


HELP = "import other tools' files, or export to them"
DESCRIPTION = (
    "Kinds: rollout dumps of slime and miles (rollout), responses of SGLang with "
    "compact or stock payloads (sglang). Pickles are read without running their code."
)


def add_arguments(verb: argparse.ArgumentParser) -> None:
    """Add the verb's flags."""
    verb.add_argument("source")
    verb.add_argument("target")
    direction = verb.add_mutually_exclusive_group(required=True)
    direction.add_argument("--from", dest="kind", choices=KINDS, help="import from this kind")
    direction.add_argument("--to", choices=KINDS, help="export a routes file to this kind")
    add_model(verb, "the model of the routes (needed for an import)")
    verb.add_argument(
        "--tokens", metavar="FILE", help="--to rollout: JSON lines with the token ids"
    )


def run(parsed: argparse.Namespace) -> int:
    """Convert one file and print what it holds."""
    # Loaded here, because torch takes seconds that `--help` must not cost.
    from ..analysis.comparison import read_token_lines
    from ..routes import conversion

    if parsed.kind:
        shape = read_shape(parsed)
        if shape is None:
            raise ConfigError(
                "these files do not describe their model",
                expected="--model DIR, or --experts, --top-k and --layers",
            )
        table = conversion.import_routes(parsed.kind, parsed.source, parsed.target, shape)
    else:
        table = open_table(parsed.source)
        if parsed.to == "sglang":
            conversion.export_sglang(table, parsed.target)
        elif parsed.tokens is None:
            raise ConfigError("this export needs the tokens", expected="--tokens FILE")
        else:
            tokens = read_token_lines(parsed.tokens)
            conversion.export_rollout_dump(table, parsed.target, tokens)
    summary = {
        "target": parsed.target,
        "sequences": table.num_sequences,
        "rows": table.num_rows,
        "covered": int(table.covered_T.sum()),
    }
    print(json.dumps(summary) if parsed.json else ", ".join(f"{k} {v}" for k, v in summary.items()))
    return 0
