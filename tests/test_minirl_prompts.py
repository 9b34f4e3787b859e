"""recipes.minirl: prompt files, the order of prompts, verifiers, the tiny task."""

import json

import pytest

from recipes.minirl.data.prompts import Prompt, read_prompts, take
from recipes.minirl.data.tiny_task import VOCABULARY, write_task, write_tokenizer
from recipes.minirl.data.verifiers import exact, math
from routing_replay.errors import DataError

GOOD = '{"prompt": "1+1=", "answer": "2"}\n'


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"prompt": "1+1=", "answer"', "the line is no JSON"),
        ('["1+1=", "2"]', "the line is no prompt"),
        ('{"prompt": "1+1="}', "the line is no prompt"),
        ('{"prompt": "1+1=", "answer": 2}', "the answer or the verifier cannot be used"),
        ('{"prompt": "", "answer": "2"}', "the prompt is no text"),
        ('{"prompt": [{"role": "user"}], "answer": "2"}', "the prompt is no text"),
        ('{"prompt": "a", "answer": "2", "verifier": "exakt"}', "the answer or the verifier"),
        ('{"prompt": "a", "answer": "2", "verifer": "math"}', "unknown key 'verifer'"),
    ],
)
def test_a_broken_line_is_named_with_its_file_its_number_and_what_was_expected(
    tmp_path, line, problem
):
    path = tmp_path / "p.jsonl"
    path.write_text(GOOD + "\n" + line + "\n" + GOOD)
    with pytest.raises(DataError) as caught:
        read_prompts(path)
    message = str(caught.value)
    assert problem in message
    assert f"{path}, line 3" in message
    assert 'expected {"prompt": text or list of messages, "answer": text' in message


def test_a_missing_or_empty_file_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"cannot be read.*nowhere\.jsonl"):
        read_prompts(tmp_path / "nowhere.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="the prompt file is empty"):
        read_prompts(tmp_path / "empty.jsonl")


def test_an_epoch_has_every_prompt_once_and_epochs_differ():
    prompts = [Prompt(prompt=str(i), answer="") for i in range(10)]
    first, second = take(prompts, 0, 10, seed=1), take(prompts, 10, 10, seed=1)
    assert sorted(p.prompt for p in first) == sorted(p.prompt for p in second)
    assert first != second


def test_the_stream_of_prompts_can_be_taken_up_at_any_position():
    prompts = [Prompt(prompt=str(i), answer="") for i in range(7)]
    whole = take(prompts, 0, 30, seed=3)
    assert take(prompts, 0, 12, seed=3) + take(prompts, 12, 18, seed=3) == whole
    assert take(prompts, 0, 30, seed=4) != whole


def test_the_exact_verifier_forgives_white_space_only():
    assert exact(" 085\n", "085") == 1.0
    assert exact("85", "085") == 0.0


@pytest.mark.parametrize(
    ("response", "answer", "reward"),
    [
        (r"So the result is \boxed{\frac{1}{2}}.", "0.5", 1.0),
        (r"We get $x = 12$", "12", 1.0),
        ("The answer is 13", "12", 0.0),
        (r"\boxed{(1, 2]}", r"(1, 2]", 1.0),
        ("no idea", "12", 0.0),
        (r"\boxed{2\sqrt{3}}", r"\sqrt{12}", 1.0),
    ],
)
def test_the_math_verifier_compares_values_not_spellings(response, answer, reward):
    assert math(response, answer) == reward


def test_the_tiny_task_is_right_and_its_two_files_share_no_prompt(tmp_path):
    train, heldout = (read_prompts(path) for path in write_task(tmp_path))
    # Operands 10..99: 90 * 90 pairs.
    assert len(train) + len(heldout) == 8100
    assert not {p.prompt for p in train} & {p.prompt for p in heldout}
    for p in heldout:
        a, b = p.prompt.removesuffix("=").split("+")
        assert int(p.answer) == int(a) + int(b)


def test_the_tiny_tokenizer_is_read_back_by_transformers_with_one_token_per_character(tmp_path):
    from transformers import AutoTokenizer

    write_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_moe"}))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer.encode("37+48=")
    assert ids == [VOCABULARY.index(c) for c in "37+48="]
    answer = [VOCABULARY.index(c) for c in "085"] + [tokenizer.eos_token_id]
    assert tokenizer.decode(answer, skip_special_tokens=True) == "085"
