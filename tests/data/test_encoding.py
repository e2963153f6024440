from copy import deepcopy

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from dpo_lightning.data.encoding import (
    cut_prompt,
    encode_batch,
    encode_completions,
    encode_prompts,
    tokenizer_fingerprint,
)


def encode_one(tokenizer, prompt, chosen, rejected, max_length=128):
    columns = encode_batch({"prompt": [prompt], "chosen": [chosen], "rejected": [rejected]}, tokenizer, max_length)
    return {key: values[0] for key, values in columns.items()}


def test_prompt_and_completion_are_tokenized_apart(tokenizer):
    # As one text, "SELECT name" would be the tokens [SELECT, Ġname]; cut after "SELECT n" it must not be.
    whole = tokenizer("SELECT name")["input_ids"]
    pair = encode_one(tokenizer, "SELECT n", "ame", "")
    assert pair["prompt_ids"] == tokenizer("SELECT n")["input_ids"]
    assert pair["chosen_ids"][:-1] == tokenizer("ame")["input_ids"]
    assert pair["prompt_ids"] + pair["chosen_ids"][:-1] != whole
    assert tokenizer.decode(pair["prompt_ids"] + pair["chosen_ids"][:-1]) == "SELECT name"


def test_every_completion_ends_in_eos_and_the_empty_one_is_eos_alone(tokenizer):
    eos = tokenizer.eos_token_id
    assert encode_completions(tokenizer, [" SELECT name", ""])[1] == [eos]
    assert encode_completions(tokenizer, [" SELECT name"])[0][-1] == eos


def test_ids_are_those_that_calling_the_tokenizer_gives(tokenizer):
    texts = [" SELECT name", "", "é 🙂 \n\t", "a<|endoftext|>b", "\nWHERE x"]
    called = [tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] for text in texts]
    assert encode_completions(tokenizer, texts) == called


@pytest.mark.parametrize("prepend", ["always", "first"])
def test_a_tokenizer_that_begins_texts_with_a_blank_does_not_begin_completions_with_one(prepend):
    tokens = ["</s>", "▁", "\n", "▁name", "▁is", "name", "is", *"nameis"]
    model = Tokenizer(models.Unigram([(token, -1 / len(token)) for token in dict.fromkeys(tokens)], 0))
    model.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend)
    model.decoder = decoders.Metaspace(prepend_scheme=prepend)
    llama = PreTrainedTokenizerFast(tokenizer_object=model, eos_token="</s>")
    assert llama.tokenize("name") == ["▁name"] and llama.tokenize("\nname") == ["▁", "\n", "name"]
    encoded = encode_completions(llama, ["name", " name is", ""])
    assert [llama.convert_ids_to_tokens(ids) for ids in encoded] == [
        ["name", "</s>"],
        ["▁name", "▁is", "</s>"],
        ["</s>"],
    ]


@pytest.mark.parametrize("pad_token_id", [None, "eos", 0])
def test_eos_is_kept_whatever_the_pad_token(tokenizer, pad_token_id):
    padded = deepcopy(tokenizer)
    if pad_token_id is not None:
        padded.pad_token_id = padded.eos_token_id if pad_token_id == "eos" else pad_token_id
    assert encode_one(padded, "p", " c", "") == encode_one(tokenizer, "p", " c", "")
    assert encode_one(padded, "p", " c", "")["chosen_ids"][-1] == tokenizer.eos_token_id


def test_a_tokenizers_own_bos_is_kept_and_its_eos_taken_off(tokenizer):
    adding = deepcopy(tokenizer)
    bos = ("<|endoftext|>", adding.eos_token_id)
    adding._tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos[0]} $A {bos[0]}", special_tokens=[bos]
    )
    plain = tokenizer("SELECT name")["input_ids"]
    assert encode_prompts(adding, ["SELECT name"], 100) == [[bos[1], *plain]]
    assert encode_completions(adding, [" name"])[0] == encode_completions(tokenizer, [" name"])[0]


def test_a_long_prompt_loses_tokens_from_the_left_and_no_completion_its_eos(tokenizer):
    long = "SELECT name FROM singer " * 20
    pair = encode_one(tokenizer, long, " name", " title FROM", max_length=16)
    longest = max(len(pair["chosen_ids"]), len(pair["rejected_ids"]))
    assert len(pair["prompt_ids"]) + longest == 16
    assert pair["prompt_ids"] == tokenizer(long)["input_ids"][-len(pair["prompt_ids"]) :]
    assert pair["chosen_ids"] == encode_completions(tokenizer, [" name"])[0]
    assert (pair["prompt_cut"], pair["completion_cut"]) == (True, False)


def test_a_completion_that_leaves_no_room_is_cut_but_ends_in_eos(tokenizer):
    pair = encode_one(tokenizer, "What is it?", " SELECT name FROM singer" * 20, "", max_length=16)
    assert len(pair["prompt_ids"]) == 1
    assert len(pair["chosen_ids"]) == 15
    assert pair["chosen_ids"][-1] == tokenizer.eos_token_id
    assert pair["rejected_ids"] == [tokenizer.eos_token_id]
    assert (pair["prompt_cut"], pair["completion_cut"]) == (True, True)


def test_a_pair_that_fits_is_whole(tokenizer):
    pair = encode_one(tokenizer, "What is it?", " name", "")
    assert (pair["prompt_cut"], pair["completion_cut"]) == (False, False)
    assert pair["length"] == len(pair["prompt_ids"]) + len(pair["chosen_ids"]) + len(pair["rejected_ids"]) - 2


def test_a_cut_prompt_keeps_its_bos():
    assert cut_prompt([1, 5, 6, 7, 8], 3, bos_token_id=1) == [1, 7, 8]
    assert cut_prompt([4, 5, 6, 7, 8], 3, bos_token_id=1) == [6, 7, 8]
    assert cut_prompt([1, 5], 3, bos_token_id=1) == [1, 5]


def test_fingerprint_tells_tokenizers_apart_and_is_stable(tokenizer):
    other = deepcopy(tokenizer)
    before = tokenizer_fingerprint(other)
    other(["some text"])  # the first call sets up truncation and padding inside
    assert before == tokenizer_fingerprint(other) == tokenizer_fingerprint(tokenizer)
    other.add_tokens(["brandnew"])
    assert tokenizer_fingerprint(other) != before
