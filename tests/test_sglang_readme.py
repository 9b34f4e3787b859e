"""The README's rollout block, against a real server."""

from readme_blocks import block, run
from sglang_servers import MODEL, random_prompt

from routing_replay import RouteTable


def test_the_rollout_block_saves_the_routes_of_every_sequence(server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prompts = [random_prompt(seed=1), random_prompt(seed=2, length=7)]
    names = run(block("client.generate"), server_urls=[server.server.url], prompts=prompts)
    table = RouteTable.open("routes.safetensors")
    assert table.shape == MODEL
    num_new = [len(completion.output_ids) for completion in names["completions"]]
    # A row for each token that was fed to the model: all but the last one.
    assert table.num_rows == 20 + num_new[0] - 1 + 7 + num_new[1] - 1
