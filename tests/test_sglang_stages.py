"""Rows of pipeline stages are joined on SGLang's own way round the ring, without a server."""

from types import SimpleNamespace

import pytest
import torch

from routing_replay.sglang import pipeline

NUM_TOKENS, NUM_LAYERS, TOP_K = 5, 4, 2


class Stage:
    """One stage's scheduler and capturer; SGLang's methods are those of its loop."""

    def __init__(self, layers, dtype):
        generator = torch.Generator().manual_seed(layers[0])
        ids_TLK = torch.zeros(NUM_TOKENS, NUM_LAYERS, TOP_K, dtype=dtype)
        drawn_TLK = torch.randint(1, 250, (NUM_TOKENS, len(layers), TOP_K), generator=generator)
        ids_TLK[:, layers] = drawn_TLK.to(dtype)
        gates_TLK = (ids_TLK / 1000).half()
        self.output = SimpleNamespace(topk=ids_TLK, values={"gates": gates_TLK}, copy_now=list)
        self.capturer = SimpleNamespace(layers=set(layers), incoming={}, last_output=None)
        self.notes = [None, None]

    def run_batch(self, scheduler, number, batch, proxy, notes, queue):
        assert proxy is None or set(proxy.tensors) == {"hidden_states"}
        self.capturer.last_output = self.output
        notes[number] = SimpleNamespace()
        tensors = SimpleNamespace(tensors={"hidden_states": torch.ones(3)})
        return SimpleNamespace(pp_hidden_states_proxy_tensors=tensors), "event"

    def launch(self, proxy):
        arguments = (1, None, proxy, self.notes, None)
        result, event = pipeline.launch(self.run_batch, self.capturer, self, arguments)
        assert event == "event"
        return result.pp_hidden_states_proxy_tensors


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16])
def test_every_stage_gets_the_rows_of_all_layers(dtype):
    stages = [Stage([0], dtype), Stage([1, 3], dtype)]
    ids_TLK = sum(stage.output.topk.clone() for stage in stages)
    gates_TLK = sum(stage.output.values["gates"].clone() for stage in stages)
    stages[1].launch(stages[0].launch(None))
    sent_round = {"next_token_ids": 1} | pipeline.leaving(stages[1].capturer)
    for stage in stages:
        result = SimpleNamespace(routed_experts_output=None)
        pipeline.arrive(stage.capturer, stage.notes[1], sent_round, result)
        assert result.routed_experts_output is stage.output
        assert torch.equal(stage.output.topk, ids_TLK)
        assert torch.equal(stage.output.values["gates"], gates_TLK)
        # Layer 2 is dense: no stage reports it.
        assert stage.capturer.layers == {0, 1, 3}


def test_a_microbatch_without_a_forward_pass_has_no_rows():
    stage = Stage([0], torch.uint8)
    assert pipeline.leaving(stage.capturer) == {}
    result = SimpleNamespace(routed_experts_output=None)
    pipeline.arrive(stage.capturer, SimpleNamespace(), {"next_token_ids": 1}, result)
    assert result.routed_experts_output is None
