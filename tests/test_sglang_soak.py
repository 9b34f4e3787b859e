"""Under load every row stays right, and a bad client harms only itself."""

import json

from sglang_checks import assert_true
from sglang_servers import random_prompt, request, while_running

from routing_replay.rollout import GenerateRequest
from tools.soak import (
    CUSTOM_PARAMS,
    START_LENGTHS,
    Figures,
    Soak,
    burst,
    growth,
    post,
    report,
)

SECONDS = 15


def test_every_row_is_right_under_load(server):
    soak = Soak(
        server=server.server, checkpoints=server.checkpoints, seconds=SECONDS, num_clients=12
    )
    figures = soak.run()
    assert figures.wrong_rows == 0
    assert dict(figures.faults) == {}
    # What only a request may lose that was ended before its prefill was complete.
    assert set(figures.uncovered) <= {"aborted"}
    assert figures.rows > 500
    assert figures.events["update"] and figures.events["closed by the client"]


def test_the_figures_can_be_written_as_json():
    figures = Figures()
    figures.events["update"] += 3
    assert json.loads(json.dumps(report(figures, 1.0)))["events"] == {"update": 3}


def test_a_soak_notices_wrong_rows(server, references):
    """Rows of the other checkpoint are wrong ones."""
    soak = Soak(
        server=server.server, checkpoints=server.checkpoints[::-1], seconds=0.1, num_clients=1
    )
    asked = request(random_prompt(90), capture="ids")
    (completion,) = server.client.generate([asked])
    soak.compare(references[::-1], asked, completion)
    assert soak.figures.rows == 31
    assert soak.figures.wrong_rows > 15


def bad_bodies():
    body = GenerateRequest(input_ids=random_prompt(91), sampling={"max_new_tokens": 2}).to_json()
    for start in START_LENGTHS:
        yield body | {"routed_experts_start_len": start}
    for params in CUSTOM_PARAMS:
        sampling = body["sampling_params"] | {"custom_params": params}
        yield body | {"sampling_params": sampling}


def test_bad_clients_harm_only_themselves(server, references):
    """Absurd start lengths, parameters of every type, connections that close, many at once."""
    asked, seen = request(random_prompt(92), num_new=300, capture="ids"), []

    def misbehave():
        seen.extend(post(server.server.url, body, closes=False) for body in bad_bodies())
        closing = request(random_prompt(93), num_new=300).to_json()
        seen.extend(post(server.server.url, closing, closes=True) for _ in range(4))
        seen.append(burst(server.server.url, request(random_prompt(95)).to_json(), 200, wait_s=0.5))

    (completion,) = while_running(server, [asked], misbehave)
    assert_true(asked, completion, references[0])
    assert seen.pop() == 200
    assert len(seen) == len(START_LENGTHS) + len(CUSTOM_PARAMS) + 4
    assert not [what for what in seen if what.startswith("no answer")]
    server.server.check()
    again = request(random_prompt(94), capture="gates")
    (completion,) = server.client.generate([again])
    assert_true(again, completion, references[0])


def test_growth_is_that_of_the_last_quarter_over_the_second():
    assert growth([9, 1, 1, 1, 2, 2, 5, 5]) == 5 - 1
    assert growth([1, 2, 3]) == 0
