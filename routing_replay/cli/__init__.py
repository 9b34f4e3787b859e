"""`routing-replay VERB`: doctor, inspect, diff, report, convert.

Exit codes: 0 fine, 1 a problem was found (an error finding, a damaged or foreign file), 2 usage.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from ..errors import ConfigError, DataError, RoutingReplayError
from ..routes.shape import MoEShape
from ..routes.table import RouteTable

KINDS = ("rollout", "sglang")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    parser = build_parser()
    try:
        parsed = parser.parse_args(arguments)
    except SystemExit as stop:  # argparse has printed its message, or the help
        return int(stop.code or 0)
    try:
        return parsed.run(parsed)
    except RoutingReplayError as error:
        if parsed.json:
            print(json.dumps({"error": type(error).__name__, "message": str(error)}))
        print(f"routing-replay: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # `| head` has seen enough
        sys.stderr.close()
        return 0


def build_parser() -> argparse.ArgumentParser:
    """The command line, each verb with its own --help."""
    parser = argparse.ArgumentParser(
        prog="routing-replay",
        description="Looks at MoE routes and at what differs between rollout and training.",
        epilog="Exit codes: 0 fine, 1 a problem was found, 2 wrong usage.",
    )
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    for add in (_add_doctor, _add_inspect, _add_diff, _add_report, _add_convert):
        verb = add(verbs)
        verb.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _add_doctor(verbs) -> argparse.ArgumentParser:
    verb = verbs.add_parser(
        "doctor",
        help="check versions, a Megatron configuration, a server, routes files",
        description="Each finding names its cause and its fix. Exit code 1 if one is an error.",
    )
    verb.add_argument(
        "--megatron-args", metavar="FILE", help="Megatron's arguments or settings (JSON, YAML)"
    )
    verb.add_argument("--replay-config", metavar="FILE", help="routing replay's settings (YAML)")
    verb.add_argument(
        "--url", metavar="URL", action="append", default=[], help="an SGLang server; repeatable"
    )
    verb.add_argument(
        "--capture",
        choices=("stock", "ids", "gates", "logits"),
        default="ids",
        help="what the job will ask the servers for (ids)",
    )
    verb.add_argument(
        "--table", metavar="FILE", action="append", default=[], help="a routes file; repeatable"
    )
    _add_model(verb, "compare the server and the tables with this model")
    verb.set_defaults(run=_doctor)
    return verb


def _doctor(parsed) -> int:
    from ..config import ReplayConfig
    from . import doctor

    path = parsed.replay_config
    replay = ReplayConfig.from_yaml(path) if path else ReplayConfig()
    model = _model(parsed)
    findings = [*doctor.check_versions(), *doctor.check_plugin()]
    if parsed.megatron_args:
        findings += doctor.check_megatron(parsed.megatron_args, replay)
    for url in parsed.url:
        findings += doctor.check_server(url, model, parsed.capture)
    for path in parsed.table:
        findings += doctor.check_table(path, model)
    order = ("error", "warning", "ok")
    findings.sort(key=lambda finding: order.index(finding.severity))
    if parsed.json:
        print(json.dumps({"findings": [finding.as_dict() for finding in findings]}))
    else:
        print("\n".join(map(str, findings)))
    return int(doctor.has_errors(findings))


def _add_inspect(verbs) -> argparse.ArgumentParser:
    verb = verbs.add_parser(
        "inspect",
        help="what is in a routes file",
        description="Shapes, coverage, origins, weight versions, load per expert and layer, bytes. "
        "Reads through memory maps: the file may be larger than memory.",
    )
    verb.add_argument("file", help="a routes file (.safetensors)")
    verb.add_argument(
        "--no-verify", action="store_true", help="skip the checksums (half the reading)"
    )
    verb.set_defaults(run=_inspect)
    return verb


def _inspect(parsed) -> int:
    from ..analysis.inspection import inspect_table

    found = inspect_table(RouteTable.open(parsed.file, verify=not parsed.no_verify))
    print(json.dumps(found.as_dict()) if parsed.json else found.text())
    return 0


def _add_diff(verbs) -> argparse.ArgumentParser:
    verb = verbs.add_parser(
        "diff",
        help="compare two sets of routes for the same tokens",
        description="Rollout against training, two checkpoints, two precisions: agreement per "
        "layer, by position and origin, and the tokens that differ most. Experts are compared as "
        "sets. Both files may be larger than memory.",
    )
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
    verb.set_defaults(run=_diff)
    return verb


def _diff(parsed) -> int:
    from ..analysis.comparison import compare_tables, token_decoder

    decode = None
    if parsed.tokenizer or parsed.tokens:
        if not (parsed.tokenizer and parsed.tokens):
            raise ConfigError("decoding needs both", expected="--tokens FILE --tokenizer PATH")
        decode = token_decoder(parsed.tokens, _tokenizer(parsed.tokenizer).decode)
    tables = [RouteTable.open(path) for path in (parsed.first, parsed.second)]
    found = compare_tables(*tables, num_worst=parsed.worst, decode=decode)
    print(json.dumps(found.as_dict()) if parsed.json else found.text())
    is_low = parsed.min_overlap is not None and any(
        layer.overlap < parsed.min_overlap for layer in found.layers
    )
    return int(is_low)


def _add_report(verbs) -> argparse.ArgumentParser:
    verb = verbs.add_parser(
        "report",
        help="one HTML page from one or several runs",
        description="A self-contained page (no network): curves, layers over steps, receipts, "
        "configuration, warnings in words. Several runs are compared.",
    )
    verb.add_argument("runs", nargs="+", metavar="RUN", help="directory with metrics.jsonl")
    verb.add_argument("-o", "--output", default="report.html", metavar="FILE")
    verb.add_argument("--title", default="")
    verb.set_defaults(run=_report)
    return verb


def _report(parsed) -> int:
    from ..report.findings import diagnose, sentence
    from ..report.page import write_report
    from ..report.run import read_run

    path = write_report(parsed.runs, parsed.output, parsed.title)
    findings = {str(run): diagnose(read_run(run)) for run in parsed.runs}
    if parsed.json:
        said = {run: [finding.as_dict() for finding in found] for run, found in findings.items()}
        print(json.dumps({"report": str(path), "findings": said}))
        return 0
    for run, found in findings.items():
        for finding in found:
            print(f"{finding.level:7s} {run}: {sentence(finding)}")
    print(path)
    return 0


def _add_convert(verbs) -> argparse.ArgumentParser:
    verb = verbs.add_parser(
        "convert",
        help="import other tools' files, or export to them",
        description="Kinds: rollout dumps of slime and miles (rollout), responses of SGLang with "
        "compact or stock payloads (sglang). Pickles are read without running their code.",
    )
    verb.add_argument("source")
    verb.add_argument("target")
    direction = verb.add_mutually_exclusive_group(required=True)
    direction.add_argument("--from", dest="kind", choices=KINDS, help="import from this kind")
    direction.add_argument("--to", choices=KINDS, help="export a routes file to this kind")
    _add_model(verb, "the model of the routes (needed for an import)")
    verb.add_argument(
        "--tokens", metavar="FILE", help="--to rollout: JSON lines with the token ids"
    )
    verb.set_defaults(run=_convert)
    return verb


def _convert(parsed) -> int:
    from ..routes import conversion

    if parsed.kind:
        model = _model(parsed)
        if model is None:
            raise ConfigError(
                "these files do not describe their model",
                expected="--model DIR, or --experts, --top-k and --layers",
            )
        table = conversion.import_routes(parsed.kind, parsed.source, parsed.target, model)
    else:
        table = RouteTable.open(parsed.source)
        if parsed.to == "sglang":
            conversion.export_sglang(table, parsed.target)
        else:
            conversion.export_rollout_dump(table, parsed.target, _read_tokens(parsed.tokens))
    said = {
        "target": parsed.target,
        "sequences": table.num_sequences,
        "rows": table.num_rows,
        "covered": int(table.covered_T.sum()),
    }
    print(json.dumps(said) if parsed.json else ", ".join(f"{k} {v}" for k, v in said.items()))
    return 0


def _add_model(verb: argparse.ArgumentParser, purpose: str) -> None:
    group = verb.add_argument_group("model", purpose)
    group.add_argument("--model", metavar="DIR", help="a Hugging Face checkpoint or its config")
    group.add_argument("--experts", type=int, metavar="E")
    group.add_argument("--top-k", type=int, metavar="K")
    group.add_argument("--layers", metavar="0-47", help="routed layers, as 0-3,5,7")


def _model(parsed) -> MoEShape | None:
    if parsed.model:
        from .doctor import read_model

        return read_model(parsed.model)
    given = (parsed.experts, parsed.top_k, parsed.layers)
    if given == (None, None, None):
        return None
    if None in given:
        raise ConfigError("a model needs all of", expected="--experts, --top-k and --layers")
    layers = parse_layers(parsed.layers)
    return MoEShape(layers=layers, num_experts=parsed.experts, top_k=parsed.top_k)


def parse_layers(text: str) -> tuple[int, ...]:
    """ "0-2,5" to (0, 1, 2, 5)."""
    layers: list[int] = []
    try:
        for part in text.split(","):
            first, _, last = part.partition("-")
            layers += range(int(first), int(last or first) + 1)
    except ValueError as error:
        raise ConfigError("a list of layers", expected="as 0-3,5,7", got=repr(text)) from error
    return tuple(sorted(set(layers)))


def _read_tokens(path: str | None) -> list[list[int]]:
    if path is None:
        raise ConfigError("this export needs the tokens", expected="--tokens FILE")
    from ..analysis.comparison import read_token_lines

    return read_token_lines(path)


def _tokenizer(path: str):
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ConfigError("--tokenizer needs transformers", got=error) from error
    if not Path(path).exists():
        raise DataError("no tokenizer there", got=path, fix="Give a local folder")
    return AutoTokenizer.from_pretrained(path)


if __name__ == "__main__":
    sys.exit(main())
