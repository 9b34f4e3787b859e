"""The bytes on the wire: what goes in comes out, and nothing else ever does."""

import base64
import resource
import sys
import time

import numpy as np
import pytest

from routing_replay.errors import PayloadError, RoutesError, RoutingReplayError
from routing_replay.routes import payload
from routing_replay.routes.origin import Origin
from routing_replay.routes.payload import decode, decode_compact, encode
from routing_replay.routes.routes import ROW_COLUMNS, RouterLogits, Routes, compact_dtype
from routing_replay.routes.shape import MoEShape
from routing_replay.routes.stock import from_wide, to_wide

MODEL = MoEShape(layers=(1, 2, 5), num_experts=16, top_k=4)


def random_ids(num_rows, model=MODEL, seed=0):
    """Distinct experts per row and layer."""
    random = np.random.default_rng(seed)
    keys_TLE = random.random((num_rows, len(model.layers), model.num_experts))
    ids_TLK = np.argsort(keys_TLE, -1)[..., : model.top_k]
    return ids_TLK.astype(compact_dtype(model.num_experts))


def full_routes(num_rows=9, model=MODEL, seed=0):
    """Every field set, one row uncovered, two weight versions."""
    random = np.random.default_rng(seed)
    ids_TLK = random_ids(num_rows, model, seed)
    covered_T = np.ones(num_rows, np.bool_)
    covered_T[3] = False
    ids_TLK[3] = 0
    gates_TLK = random.random(ids_TLK.shape).astype(np.float16)
    gates_TLK[3] = 0
    weights_TLK = random.random(ids_TLK.shape).astype(np.float32)
    weights_TLK[3] = 0
    origin_T = np.where(np.arange(num_rows) < 5, Origin.PREFILL, Origin.DECODE)
    origin_T[3] = Origin.ABSENT
    shape = (2, len(model.layers), model.num_experts)
    return Routes(
        expert_ids_TLK=ids_TLK,
        layers=model.layers,
        num_experts=model.num_experts,
        covered_T=covered_T,
        combine_weights_TLK=weights_TLK,
        gate_probs_TLK=gates_TLK,
        router_logits=RouterLogits(
            rows_N=np.array([1, 6]), values_NLE=random.normal(size=shape).astype(np.float32)
        ),
        origin_T=origin_T.astype(np.uint8),
        weight_version_T=np.where(np.arange(num_rows) < 7, 3, 4),
    )


def text(data):
    return base64.b64encode(data).decode()


def meta(data, **fields):
    return {"routed_experts": text(data), **fields}


def stock(ids_TLK, num_layers=6, layers=MODEL.layers):
    """What stock SGLang sends: int32, all layers, dense ones zero."""
    wide_TLK = np.zeros((len(ids_TLK), num_layers, ids_TLK.shape[2]), np.int32)
    wide_TLK[:, list(layers)] = ids_TLK
    return wide_TLK.tobytes()


def assert_equal(got, expected):
    for name in ROW_COLUMNS:
        np.testing.assert_array_equal(getattr(got, name), getattr(expected, name))
    assert (got.layers, got.num_experts) == (expected.layers, expected.num_experts)
    np.testing.assert_array_equal(got.router_logits.rows_N, expected.router_logits.rows_N)
    np.testing.assert_array_equal(got.router_logits.values_NLE, expected.router_logits.values_NLE)


@pytest.mark.parametrize("num_experts", [16, 256, 257, 512])
def test_a_payload_returns_every_field_for_one_and_two_byte_ids(num_experts):
    model = MoEShape(layers=(0, 3, 17), num_experts=num_experts, top_k=8)
    routes = full_routes(model=model)
    got = decode(meta(encode(routes, start=4)), num_tokens=14, shape=model, start=4)
    assert_equal(got, routes)
    assert got.expert_ids_TLK.dtype == (np.uint8 if num_experts <= 256 else np.uint16)


def test_a_sequence_without_rows_is_a_valid_payload():
    routes = Routes(expert_ids_TLK=random_ids(0), layers=MODEL.layers, num_experts=16)
    assert decode(meta(encode(routes)), num_tokens=1, shape=MODEL).num_rows == 0


@pytest.mark.parametrize("num_rows", [20, 100, 2000])
@pytest.mark.parametrize(("num_experts", "top_k"), [(32, 4), (128, 8), (256, 8)])
def test_a_payload_has_a_quarter_of_stocks_bytes(num_rows, num_experts, top_k):
    """Even where all layers are routed: an id takes one byte of stock's four."""
    model = MoEShape(layers=tuple(range(24)), num_experts=num_experts, top_k=top_k)
    ids_TLK = random_ids(num_rows, model)
    routes = Routes(expert_ids_TLK=ids_TLK, layers=model.layers, num_experts=num_experts)
    # The header's 32 bytes, 3 of the bitmap, 13 of one run, 4 of the checksum come on top.
    assert len(encode(routes)) == len(stock(ids_TLK, 24, model.layers)) // 4 + 52
    np.testing.assert_array_equal(decode_compact(encode(routes))[0].expert_ids_TLK, ids_TLK)


@pytest.mark.parametrize("is_installed", [True, False])
def test_base64_is_alike_with_and_without_the_fast_library(monkeypatch, is_installed):
    if is_installed:
        pytest.importorskip("pybase64")
    else:
        monkeypatch.setitem(sys.modules, "pybase64", None)
    monkeypatch.setattr(payload, "_base64", payload._base64.__wrapped__)
    assert (payload._base64().__name__ == "pybase64") == is_installed
    assert payload.from_base64("AAECAw==") == bytes([0, 1, 2, 3])
    assert payload.to_base64(bytes([0, 1, 2, 3])) == "AAECAw=="
    for wrong in ("AAECAw=", "AAEC\nAw==", "AAECAw==AA==", "AAE CAw==", "é"):
        with pytest.raises(PayloadError, match="the payload is damaged; expected base64"):
            payload.from_base64(wrong)


def test_a_stock_payload_loses_its_dense_layers():
    ids_TLK = random_ids(8)
    got = decode(meta(stock(ids_TLK)), num_tokens=9, shape=MODEL)
    np.testing.assert_array_equal(got.expert_ids_TLK, ids_TLK)
    assert got.layers == MODEL.layers
    assert got.covered_T.all()


def test_a_stock_payload_after_a_retraction_vouches_for_no_row():
    got = decode(meta(stock(random_ids(8)), num_retractions=1), num_tokens=9, shape=MODEL)
    assert not got.covered_T.any()


def test_rows_that_stock_never_captured_are_not_covered():
    ids_TLK = random_ids(8)
    ids_TLK[2:4] = 0
    got = decode(meta(stock(ids_TLK)), num_tokens=9, shape=MODEL)
    assert got.covered_T.tolist() == [True] * 2 + [False] * 2 + [True] * 4


def test_a_layer_that_stock_never_captured_is_named():
    ids_TLK = random_ids(8)
    ids_TLK[:, 1] = 0
    with pytest.raises(RoutesError, match="a layer is zero in every row.*layer 2"):
        decode(meta(stock(ids_TLK)), num_tokens=9, shape=MODEL)


@pytest.mark.parametrize(
    ("meta_info", "message"),
    [
        ({}, "the answer holds no routes"),
        ({"routed_experts": None}, "the answer holds no routes"),
        ({"routed_experts": "no base64!"}, "the payload is damaged; expected base64"),
        ({"routed_experts": [1, 2]}, "expected a base64 string; got list"),
        (meta(b""), "a stock payload has another size"),
        (meta(stock(random_ids(8))[:-1]), "a stock payload has another size"),
        (meta(stock(random_ids(7))), "a stock payload has another size"),
        (meta(stock(random_ids(8), num_layers=4, layers=(1, 2, 3))), "of another number of layers"),
        (meta(stock(random_ids(8), layers=(0, 2, 5))), "should be dense has routes"),
        (meta(stock(random_ids(8).astype(np.int32) + 9)), "an expert id is out of range"),
        (meta(encode(full_routes())), "the payload covers other tokens"),
        (meta(encode(full_routes(8), start=1)), "8 rows from row 0; got 8 rows from row 1"),
        (meta(b"RRPL"), "the payload is damaged"),
        (meta(encode(full_routes(8))[:-1]), "expected its checksum; got another"),
    ],
)
def test_a_wrong_payload_says_what_is_wrong(meta_info, message):
    with pytest.raises(PayloadError, match=message):
        decode(meta_info, num_tokens=9, shape=MODEL)


def test_another_model_version_or_payload_kind_is_refused():
    data = encode(full_routes(8))
    other = MoEShape(layers=(1, 2, 5), num_experts=16, top_k=2)
    with pytest.raises(PayloadError, match="the server runs another model.*top-2.*got.*top-4"):
        decode(meta(data), num_tokens=9, shape=other)
    newer = resealed(data[:4] + b"\x06\x00" + data[6:])
    with pytest.raises(PayloadError, match="of another version; expected 5; got 6"):
        decode(meta(newer), num_tokens=9, shape=MODEL)
    with pytest.raises(PayloadError, match="SGLang's own payload"):
        decode(meta(stock(random_ids(8))), num_tokens=9, shape=MODEL, accept_stock=False)
    with pytest.raises(PayloadError, match="does not describe itself"):
        decode(meta(stock(random_ids(8))), num_tokens=9)


def test_a_payload_of_version_2_is_told_by_its_version():
    """64 rows of experts 0 and 1, deflated, as routing_replay wrote them until November 2026."""
    old = (
        "UlJQTAIAAAFAAAAAAAAAAAEAAQACAAQAAQAAAAAAAAAlAAAAAAAAAAFAAAAAAf//////////BcEBAQAAAICQ/D8d"
        "SZIkSZIkSZIkSZIkSZIkSZIkSZIkSZIkA+dIEoU="
    )
    message = "of another version; expected 5; got 2. Install the same routing_replay"
    with pytest.raises(PayloadError, match=message):
        decode({"routed_experts": old}, num_tokens=65)


def resealed(data):
    """The payload with a checksum that fits: an attacker's, not an accident's."""
    return data[:-4] + payload.CHECKSUM.pack(payload.zlib.crc32(data[:-4]))


def test_25000_random_mutations_never_decode_to_other_routes():
    routes = full_routes(8)
    data = encode(routes)
    random = np.random.default_rng(1)
    start, before = time.monotonic(), peak_bytes()
    num_equal = 0
    for number in range(25_000):
        # Alternately the bytes, under a right base64, and the text itself.
        if number % 2:
            mutated = meta(mutate(data, random))
        else:
            mutated = {"routed_experts": mutate(text(data).encode(), random)}
        try:
            got = decode(mutated, num_tokens=9, shape=MODEL)
        except RoutingReplayError:
            continue
        assert_equal(got, routes)
        num_equal += 1
    # Some mutations write what stood there already; most are real and were refused.
    assert num_equal < 250
    assert time.monotonic() - start < 120
    assert peak_bytes() - before < 64 * 2**20


def test_headers_that_lie_under_a_right_checksum_are_refused_in_bounded_memory():
    data = encode(full_routes(8))
    random = np.random.default_rng(2)
    before = peak_bytes()
    for _ in range(20_000):
        changed = bytearray(data)
        at, size = random.integers(4, payload.HEADER.size), random.integers(1, 5)
        changed[at : at + size] = random.bytes(size)
        try:
            got = decode(meta(resealed(bytes(changed[: len(data)]))), num_tokens=9, shape=MODEL)
        except RoutingReplayError:
            continue
        np.testing.assert_array_equal(got.expert_ids_TLK, routes_of(data).expert_ids_TLK)
    assert peak_bytes() - before < 64 * 2**20


def routes_of(data):
    return decode_compact(data)[0]


def test_a_terabyte_in_the_header_allocates_nothing():
    header = payload.Header(*payload.HEADER.unpack_from(encode(full_routes(8))))
    header = header._replace(num_rows=2**32 - 1, top_k=2**15, num_experts=2**15)
    lie = payload.HEADER.pack(*header) + encode(full_routes(8))[payload.HEADER.size :]
    before = peak_bytes()
    with pytest.raises(PayloadError, match="damaged"):
        decode_compact(resealed(lie))
    assert peak_bytes() - before < 2**20


def mutate(data, random):
    """Flip bits, overwrite, cut, insert, repeat: one to four of them."""
    changed = bytearray(data)
    for _ in range(random.integers(1, 5)):
        at = int(random.integers(0, max(1, len(changed))))
        match random.integers(0, 5):
            case 0 if changed:
                changed[at] ^= 1 << int(random.integers(0, 8))
            case 1:
                changed[at : at + 4] = random.bytes(4)
            case 2:
                del changed[at:]
            case 3:
                changed[at:at] = random.bytes(int(random.integers(1, 9)))
            case 4:
                changed[at:at] = changed[: int(random.integers(1, 40))]
    return bytes(changed)


def peak_bytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_an_array_of_another_shape_or_type_is_refused():
    for wrong in (np.zeros((8, 3)), np.zeros((8, 3, 2), int), np.zeros((8, 3, 4))):
        with pytest.raises(PayloadError, match="have another shape; expected integers"):
            from_wide(wrong, MODEL)


def test_routes_come_back_from_the_wide_array_of_other_tools():
    routes = Routes(expert_ids_TLK=random_ids(8), layers=MODEL.layers, num_experts=16)
    back = from_wide(to_wide(routes), MODEL)
    np.testing.assert_array_equal(back.expert_ids_TLK, routes.expert_ids_TLK)
