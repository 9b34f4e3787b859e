"""Ask an SGLang server for routes, and print which experts each token went to.

    python examples/sglang_capture.py                            launch a tiny model on this machine
    python examples/sglang_capture.py --url http://host:30000    ask a server that runs already

A server of your own needs `pip install routing_replay` beside SGLang and the argument
`--enable-return-routed-experts`. For gates (the probabilities of the selected experts) set
ROUTING_REPLAY_CAPTURE=gates in its environment; without it, it returns ids.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # recipes/ is not installed with the package

from recipes.serving import ServerOptions, launch
from routing_replay.rollout import Completion, GenerateRequest, RolloutClient, probe
from routing_replay.routes.origin import Origin

PROMPT = (11, 42, 7, 99, 23)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", help="a running server; without it a tiny one is launched")
    parser.add_argument("--capture", default="gates", choices=["ids", "gates"])
    options = parser.parse_args()
    with contextlib.nullcontext(options.url) if options.url else tiny_server() as url:
        # Two tiny requests prove that routes come back, from the right row, with their gates.
        print("probe:", probe(url, capture=options.capture))
        request = GenerateRequest(
            input_ids=PROMPT,
            sampling={"temperature": 1.0, "max_new_tokens": 4, "ignore_eos": True},
            capture=options.capture,
        )
        (completion,) = RolloutClient([url]).generate([request])
    print_routes(completion)


@contextlib.contextmanager
def tiny_server() -> Iterator[str]:
    """Serve a random model of a megabyte; yield its URL."""
    from tiny_checkpoint import write_tiny_checkpoint

    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write_tiny_checkpoint(Path(folder))
        print("launching SGLang ...", flush=True)
        with launch(checkpoint, ServerOptions(capture="gates")) as server:
            yield server.url


def print_routes(completion: Completion) -> None:
    """Print a line for each token and layer: experts, and their probabilities if captured."""
    routes = completion.routes
    # The last sampled token was never fed to the model: it has no row.
    tokens = [*PROMPT, *completion.output_ids][:-1]
    for row, token in enumerate(tokens):
        print(f"token {row} (id {token}, {Origin(routes.origin_T[row]).name.lower()})")
        for column, layer in enumerate(routes.layers):
            line = f"  layer {layer}: experts {routes.expert_ids_TLK[row, column].tolist()}"
            if routes.gate_probs_TLK is not None:
                line += f", gates {routes.gate_probs_TLK[row, column].astype(float).round(3)}"
            print(line)
    print("log-probs of the sampled tokens:", completion.mu_logprobs.astype(float).round(3))


if __name__ == "__main__":
    main()
