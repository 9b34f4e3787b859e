"""Prove with two tiny requests, before a job starts, that a server returns true routes."""

from __future__ import annotations

import http.client as http_client
import json
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..capture import OURS
from ..errors import PayloadError, ServerError
from ..routes.origin import Origin, num_uncovered
from ..routes.payload import FIELD, MAGIC, from_base64
from ..routes.routes import Routes
from ..routes.shape import MoEShape
from .requests import Completion, GenerateRequest, completion_of

# Ids that exist in every vocabulary, and enough of them that a shift by one row would show.
PROMPT = tuple(range(3, 15))
NUM_NEW = 4
TIMEOUT_S = 60.0
# float16 gates of K experts: each is off by at most one unit in its eleventh bit.
GATE_SUM_SLACK = 2.0**-8
# One gate: half a unit in the eleventh bit, and float32 arithmetic on the server.
GATE_SLACK = 2.0**-11


@dataclass(frozen=True, kw_only=True)
class ProbeReport:
    """The properties that a probe proved.

    Args:
        url: The server, or the gateway in front of it.
        checks: One line for each property that was proved.
        routes: The routes of the probe's prompt.
    """

    url: str
    checks: tuple[str, ...]
    routes: Routes

    def __str__(self) -> str:
        return "; ".join(self.checks)


def probe(
    url: str,
    model: MoEShape | None = None,
    capture: str = "ids",
    timeout_s: float = TIMEOUT_S,
) -> ProbeReport:
    """Prove that routes come back whole, from the right row, and match their gates.

    Args:
        url: A server, or whatever stands between it and the trainer.
        model: Layers, experts and top-k that the routes must have; needed for "stock".
        capture: The level that the job will ask for.
        timeout_s: For each of the requests.

    Raises:
        ServerError: What is missing, where, and what to do.
    """
    url = url.rstrip("/")
    http = _Http(url, timeout_s)

    def ask(start: int) -> Completion:
        return _ask(http, capture, start, model)

    return _report(ask, capture, url)


class _Http:
    """One server, with the standard library: a probe sends two or three requests."""

    def __init__(self, url: str, timeout_s: float):
        self.url = url
        self._timeout_s = timeout_s
        # Servers are named by address: a proxy of the environment is for other traffic.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def send(self, route: str, body: dict[str, Any] | None = None) -> tuple[int, str]:
        """Return status and text of the answer; OSError without one."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + route, data, headers)
        try:
            with self._opener.open(request, timeout=self._timeout_s) as response:
                return response.status, response.read().decode(errors="replace")
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode(errors="replace")


def _checked_coverage(routes: Routes, url: str) -> list[str]:
    """Accept a prompt that another server has prefilled; its rows are there."""
    causes = num_uncovered([routes])
    num_transferred = causes.get(Origin.TRANSFERRED.name.lower(), 0)
    if sum(causes.values()) > min(num_transferred, len(PROMPT)):
        raise ServerError(
            "the server returns rows that it cannot vouch for",
            expected=f"{routes.num_rows} covered rows",
            got=f"{int(routes.covered_T.sum())}; not covered: "
            + ", ".join(f"{cause} {count}" for cause, count in causes.items()),
            where=url,
            fix="A feature of the server loses them: see docs/capture.md",
        )
    if not num_transferred:
        return []
    return [f"{num_transferred} rows of the prompt are another server's: they are not covered"]


def _report(ask: Callable[[int], Completion], capture: str, url: str) -> ProbeReport:
    whole = ask(0)
    routes = whole.routes
    num_rows = len(PROMPT) + len(whole.output_ids) - 1
    if routes is None:
        raise ServerError(
            "the probe asks for no routes", expected="a capture level", got=repr(capture), where=url
        )
    checks = [
        f"answers, with log-probs, from weight version {whole.weight_version or 'unknown'}",
        f"routes of {routes.num_rows} of {num_rows} tokens: {len(routes.layers)} layers, "
        f"{routes.num_experts} experts, top-{routes.top_k}",
    ]
    checks += _checked_coverage(routes, url)
    start = len(PROMPT) - 2
    delta = ask(start).routes
    assert delta is not None  # the level asks for routes
    # Only prompt rows: the second request samples tokens of its own.
    if not np.array_equal(delta.expert_ids_TLK[:1], routes.expert_ids_TLK[start : start + 1]):
        raise ServerError(
            "the server does not honour routed_experts_start_len",
            expected=f"rows from {start} on",
            got="different rows",
            where=url,
            fix="Use SGLang 0.5.12 or newer on the server, and a gateway that passes the field",
        )
    checks.append("start honoured")
    if routes.combine_weights_TLK is not None:
        sums_TL = routes.combine_weights_TLK.sum(-1)
        checks.append(f"combine weights: in sum {sums_TL.min():.4g} to {sums_TL.max():.4g}")
    if capture in ("gates", "logits"):
        checks.append(_check_gates(routes, url))
    if capture == "logits":
        checks.append(_check_logits(routes, url))
    return ProbeReport(url=url, checks=tuple(checks), routes=routes)


def _ask(http: _Http, capture: str, start: int, model: MoEShape | None) -> Completion:
    sampling = {"temperature": 0.0, "max_new_tokens": NUM_NEW, "ignore_eos": True}
    request = GenerateRequest(input_ids=PROMPT, sampling=sampling, capture=capture, start=start)
    answer, url = _post(http, request.to_json()), http.url
    meta_info = answer.get("meta_info") if isinstance(answer, dict) else None
    if isinstance(meta_info, dict) and capture != "off":
        _check_field(http, meta_info, capture)
    try:
        return completion_of(answer, request, url, model)
    except PayloadError as error:
        raise ServerError(str(error), where=url, fix=error.fix) from error


def _post(http: _Http, body: dict[str, Any]) -> Any:
    try:
        status, text = http.send("/generate", body)
    except (OSError, http_client.HTTPException) as error:
        raise ServerError(
            "the server does not answer",
            got=f"{type(error).__name__} {error}".strip(),
            where=http.url,
            fix="Is it running, is the address right, does it hang? See its log",
        ) from error
    if status != 200:
        raise ServerError(
            "the server refuses a request for routes",
            got=f"status {status}: {text[:300]}",
            where=f"{http.url}/generate",
            fix="A gateway that knows no /generate, or no return_routed_experts: ask the SGLang "
            "server behind it",
        )
    try:
        return json.loads(text)
    except ValueError as error:
        raise ServerError(
            "the answer is not JSON",
            got=repr(text[:100]),
            where=http.url,
            fix="Ask the server itself",
        ) from error


def _check_field(http: _Http, meta_info: dict[str, Any], capture: str) -> None:
    """Name who lost the routes: the server's start, the plugin, or a gateway."""
    text, url = meta_info.get(FIELD), http.url
    if text is None:
        flag = _server_flag(http, "enable_return_routed_experts")
        raise ServerError(
            "no routes come back",
            expected=f"meta_info.{FIELD}",
            got=", ".join(sorted(meta_info)),
            where=url,
            fix="Start the server with --enable-return-routed-experts"
            if flag is False
            else "The server would return them: a gateway in between drops the field; use the "
            "server's own address, or a gateway that passes it",
        )
    if capture in OURS and not from_base64(text).startswith(MAGIC):
        raise ServerError(
            "the server answers with SGLang's own payload",
            expected="a compact payload",
            got=f"{len(text)} characters without its mark",
            where=url,
            fix="The plugin is missing: pip install routing_replay beside the server; a gateway in "
            "between must pass sampling_params.custom_params",
        )


def _server_flag(http: _Http, name: str) -> Any:
    try:
        return json.loads(http.send("/server_info")[1]).get(name)
    except (OSError, http_client.HTTPException, ValueError, AttributeError):
        return None


def _check_gates(routes: Routes, url: str) -> str:
    gates_TLK = routes.gate_probs_TLK
    if gates_TLK is None:
        raise ServerError(
            "no gates come back",
            expected="a probability for each selected expert",
            got="ids alone",
            where=url,
            fix="Start the server with the capture level gates (ServerOptions.capture)",
        )
    mass_TL = gates_TLK.astype(np.float32).sum(-1)
    # A single gate may round to zero in float16; all of a token cannot.
    if (mass_TL <= 0).any() or (mass_TL > 1 + GATE_SUM_SLACK).any():
        raise ServerError(
            "the gates are not those of the ids",
            expected="positive, at most 1 in sum",
            got=f"sums of {mass_TL.min()} to {mass_TL.max()}",
            where=url,
            fix="Report it with the model's name: its router is unknown to the capture",
        )
    return f"gates match: the selected experts hold {mass_TL.mean():.0%} of the probability"


def _check_logits(routes: Routes, url: str) -> str:
    logits = routes.router_logits
    if logits is None:
        raise ServerError(
            "no router logits come back",
            expected="logits of a sample of tokens",
            got="none",
            where=url,
            fix="Start the server with the capture level logits (ServerOptions.capture)",
        )
    assert routes.gate_probs_TLK is not None  # `_check_gates` comes first
    rows_N, logits_NLE = logits.rows_N, logits.values_NLE.astype(np.float64)
    ids_NLK = routes.expert_ids_TLK[rows_N].astype(np.int64)
    gates_NLK = routes.gate_probs_TLK[rows_N].astype(np.float64)
    worst = min(
        np.abs(np.take_along_axis(probs_NLE, ids_NLK, -1) - gates_NLK).max(initial=0.0)
        for probs_NLE in _distributions(logits_NLE)
    )
    if worst > GATE_SLACK:
        raise ServerError(
            "the gates are not those of the logits",
            expected=f"at most {GATE_SLACK:.1e} apart",
            got=f"{worst:.1e}",
            where=url,
            fix="Report it with the model's name: its router is unknown to the capture",
        )
    return f"router logits of {len(rows_N)} of {routes.num_rows} tokens, gates equal to theirs"


def _distributions(logits_NLE: np.ndarray) -> list[np.ndarray]:
    """What a router may make of its logits: softmax, sigmoid, square root of softplus."""
    exp_NLE = np.exp(logits_NLE - logits_NLE.max(-1, keepdims=True))
    scores = (exp_NLE, 1 / (1 + np.exp(-logits_NLE)), np.sqrt(np.logaddexp(0, logits_NLE)))
    return [scores_NLE / scores_NLE.sum(-1, keepdims=True) for scores_NLE in scores]
