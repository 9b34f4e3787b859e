"""`routing-replay diff`: compare two sets of routes for the same tokens."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from ..errors import ConfigError, DataError
from ..routes.parts import open_table

HELP = "compare two sets of routes for the same tokens"
DESCRIPTION = (
    "Rollout against training, two checkpoints, two precisions: agreement per "
    "layer, by position and origin, and the tokens that differ most. Experts are compared as "
    "sets. Both files may be larger than memory."
)


def add_arguments(verb: argparse.ArgumentParser) -> None:
    """Add the verb's flags."""
    verb.add_argument("first", help="a routes file, taken as the reference")
    verb.add_argument("second", help="a routes file of the same sequences")
    verb.add_argument("--worst", type=int, default=10, metavar="N", help="tokens to name (10)")
    verb.add_argument("--tokens", metavar="FILE", help="JSON lines: the token ids of each sequence")
    verb.add_argument("--tokenizer", metavar="PATH", help="shows the named tokens as text")
    verb.add_argument(
        "--min-overlap",
        type=float,
        metavar="X",
        help="exit code 1 if the overlap of some layer is below X",
    )


def run(parsed: argparse.Namespace) -> int:
    """Print the comparison of two tables; 1 if a layer's overlap is too low."""
    # Loaded here, because torch takes seconds that `--help` must not cost.
    from ..analysis.comparison import compare_tables, token_decoder

    decode = None
    if parsed.tokenizer or parsed.tokens:
        if not (parsed.tokenizer and parsed.tokens):
            raise ConfigError(
                "decoding tokens needs two files", expected="--tokens FILE --tokenizer PATH"
            )
        decode = token_decoder(parsed.tokens, _tokenizer_decode(parsed.tokenizer))
    tables = [open_table(path) for path in (parsed.first, parsed.second)]
    comparison = compare_tables(*tables, num_worst=parsed.worst, decode=decode)
    print(json.dumps(comparison.as_dict()) if parsed.json else comparison.text())
    is_low = parsed.min_overlap is not None and any(
        layer.overlap < parsed.min_overlap for layer in comparison.layers
    )
    return int(is_low)


def _tokenizer_decode(path: str) -> Callable[[Sequence[int]], str]:
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ConfigError("transformers is missing, which --tokenizer needs", got=error) from error
    if not Path(path).exists():
        raise DataError("the tokenizer does not exist", got=path, fix="Give a local folder")
    tokenizer = AutoTokenizer.from_pretrained(path)
    return lambda ids: str(tokenizer.decode(list(ids)))
