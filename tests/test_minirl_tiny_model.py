"""recipes.minirl.data.tiny_model: the checkpoint that runs with the same settings share."""

import pytest
import torch

from recipes.minirl.data import tiny_model
from recipes.minirl.data.tiny_task import EOS, VOCABULARY
from recipes.minirl.settings.command_line import parse

SMALL = ["--warmup-target", "0", "--tiny-layers", "2", "--tiny-experts", "4"]


def test_two_runs_that_make_the_same_model_at_once_share_one(tmp_path, monkeypatch):
    config = parse([*SMALL, "--cache-dir", str(tmp_path)])
    make_model, folders = tiny_model.make_model, []

    def while_another_run_finishes(config):
        monkeypatch.setattr(tiny_model, "make_model", make_model)
        monkeypatch.setattr(tiny_model.os, "getpid", lambda: 0)  # the other run's
        folders.append(tiny_model.prepare(config))
        return make_model(config)

    monkeypatch.setattr(tiny_model, "make_model", while_another_run_finishes)
    folder = tiny_model.prepare(config)
    assert folders == [folder]
    assert (folder / "model.safetensors").is_file()
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]  # nothing half made is left


def embedding_gradient(model, tokens):
    """Norm of the gradient of the sequence's mean negative log-prob by its embeddings."""
    ids = torch.tensor([[VOCABULARY.index(token) for token in tokens]])
    # transformers' own embedding drops the gradient of the padding token; Megatron's does not.
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    model(inputs_embeds=embeddings, labels=ids).loss.backward()
    return embeddings.grad.norm()


@pytest.fixture(scope="module")
def model():
    return tiny_model.make_model(parse(SMALL))


@pytest.mark.parametrize("token", VOCABULARY)
def test_the_gradient_of_every_token_that_can_be_sampled_has_the_usual_size(model, token):
    # RMSNorm divides by sqrt(mean square + 1e-6): a zero embedding scales its gradient by 1,000.
    prompt = [*"37+48=0"]
    usual = embedding_gradient(model, [*prompt, "8", "5", EOS])
    assert embedding_gradient(model, [*prompt, token, "5", EOS]) < 5 * usual
