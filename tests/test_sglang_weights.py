"""Combine weights of a real server are those of an independent forward, scaling included."""

from importlib.util import find_spec

import numpy as np
import pytest
from sglang_checks import Reference
from sglang_servers import ARGUMENTS, random_prompt, request
from tiny_models import write_tiny_glm4_moe

from recipes.serving.server import ServerOptions, launch
from routing_replay.rollout import RolloutClient, probe
from routing_replay.routes.shape import MoEShape

pytestmark = pytest.mark.skipif(not find_spec("sglang"), reason="SGLang is not installed")


@pytest.mark.timeout(600)
def test_weights_of_a_sigmoid_router_with_bias_groups_and_later_scaling(tmp_path):
    """GLM-4-MoE: renormalised over the selected experts; its layer's sum is scaled by 1.5."""
    checkpoint = write_tiny_glm4_moe(tmp_path / "glm4")
    model = MoEShape(layers=(1, 2), num_experts=8, top_k=4)
    options = ServerOptions(
        capture="weights", arguments=ARGUMENTS, environment={"OMP_NUM_THREADS": "1"}
    )
    asked = [request(random_prompt(n, length=40), capture="weights") for n in range(2)]
    with launch(checkpoint, options) as server:
        assert "combine weights: in sum 1.5 to 1.5" in str(probe(server.url, model, "weights"))
        client = RolloutClient([server.url], model)
        completions = client.generate(asked)
        (ids,) = client.generate([request(random_prompt(0), capture="ids")])
    assert ids.routes.combine_weights_TLK is None
    reference = Reference(checkpoint)
    for one, completion in zip(asked, completions, strict=True):
        routes = completion.routes
        logits_TLE, _, _ = reference([*one.input_ids, *completion.output_ids][:-1])
        scores_TLE = 1 / (1 + np.exp(-logits_TLE))
        ids_TLK = routes.expert_ids_TLK.astype(np.int64)
        selected_TLK = np.take_along_axis(scores_TLE, ids_TLK, -1)
        expected_TLK = 1.5 * selected_TLK / selected_TLK.sum(-1, keepdims=True)
        # float32 on both sides, sums in another order.
        np.testing.assert_allclose(routes.combine_weights_TLK, expected_TLK, rtol=2e-3)
        assert routes.covered_T.all() and routes.gate_probs_TLK is None
