"""recipes.minirl.launch.addresses: where the servers reach a trainer."""

import pytest

from recipes.minirl.launch.addresses import address_towards, is_loopback
from routing_replay.errors import ServerError


@pytest.mark.parametrize("url", ["http://127.0.0.1:30000", "http://localhost:30000"])
def test_servers_on_this_machine_alone_reach_the_trainer_by_its_loopback(url):
    assert is_loopback(address_towards([url]))


def test_a_server_of_another_machine_decides_the_address_for_all():
    # Of the block that is reserved for documentation: nobody answers, and a route may be missing.
    try:
        address = address_towards(["http://127.0.0.1:1", "http://192.0.2.1:1"])
    except ServerError as error:
        assert "no route leads to the server" in str(error) and "192.0.2.1" in str(error)
    else:
        assert not is_loopback(address)


def test_a_server_whose_name_is_unknown_is_a_clear_error():
    with pytest.raises(ServerError, match=r"no route leads to the server.*name\.invalid"):
        address_towards(["http://name.invalid:30000"])
