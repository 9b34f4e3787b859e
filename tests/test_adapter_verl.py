"""The verl adapter without verl: how its rollout server reads the routes of SGLang."""

import asyncio
import base64
import sys
import types

import numpy as np
import pytest

from routing_replay.adapters import verl
from routing_replay.errors import PayloadError

HF_CONFIG = types.SimpleNamespace(num_hidden_layers=3, num_experts_per_tok=2)
IDS_TLK = np.arange(30, dtype=np.int32).reshape(5, 3, 2)


def meta_info(ids_TLK=IDS_TLK, **more):
    return {"routed_experts": base64.b64encode(ids_TLK.tobytes()).decode(), **more}


def test_sglangs_payload_becomes_the_tensor_that_verl_expects():
    assert (verl.routes_of(meta_info(), HF_CONFIG).numpy() == IDS_TLK).all()


def test_rows_after_a_retraction_are_not_covered():
    assert not verl.routes_of(meta_info(num_retractions=1), HF_CONFIG).any()


def test_a_payload_of_another_model_is_refused():
    with pytest.raises(PayloadError, match="rows of 3 layers x 2 slots x 4 bytes"):
        verl.routes_of(meta_info(IDS_TLK[:, :2]), HF_CONFIG)


@pytest.fixture
def manager(monkeypatch):
    """SGLang's class as far as verl's server calls it, patched as after verl's import."""

    class TokenizerManager:
        model_config = types.SimpleNamespace(hf_config=HF_CONFIG)

        async def generate_request(self, obj, request=None):
            yield {"output_ids": [1], "meta_info": obj}

    module = types.ModuleType(verl.TOKENIZER_MANAGER)
    module.TokenizerManager = TokenizerManager
    monkeypatch.setitem(sys.modules, verl.TOKENIZER_MANAGER, module)
    verl.decode_routes(types.ModuleType("server"))
    return TokenizerManager()


async def first(manager, obj):
    return await manager.generate_request(obj, None).__anext__()


def test_verls_server_reads_routes_where_sglang_has_text(manager):
    output = asyncio.run(first(manager, meta_info()))
    assert (output["meta_info"]["routed_experts"].numpy() == IDS_TLK).all()


def test_an_answer_without_routes_stays_as_it_is(manager):
    assert asyncio.run(first(manager, {"id": "x"})) == {"output_ids": [1], "meta_info": {"id": "x"}}


def test_nothing_is_installed_unless_a_mode_asks_for_it():
    assert verl.ENGINE not in sys.modules
    assert not any("_AfterImport" in type(finder).__name__ for finder in sys.meta_path)
