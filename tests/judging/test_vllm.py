"""Samples by vLLM: the same replies and log-probs as by transformers, errors in one line, and no server left behind.

A small program speaks for vLLM where it is not installed, in the part of its protocol that is used. Where the command
`vllm` is found, or DPO_VLLM names it, it is asked itself.
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dpo_lightning.data.generated import Generation
from dpo_lightning.errors import UserError
from dpo_lightning.judging.sampling import VLLM, JudgedReplies
from dpo_lightning.models.policy import load_policy
from dpo_lightning.models.vllm import Sampling, Server
from processes import alive, gone
from vllm_stand_in import stand_in_command

REAL = os.environ.get("DPO_VLLM", "vllm")
needs_vllm = pytest.mark.skipif(shutil.which(REAL) is None, reason="no vLLM is installed; DPO_VLLM names its command")


@pytest.fixture
def stand_in(tmp_path):
    """The command of the small program."""
    return stand_in_command(tmp_path)


@pytest.fixture
def model(tokenizer, tmp_path):
    """The folder of a model that ends some of its replies, with heads as large as vLLM wants them."""
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=128, tie_word_embeddings=False, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    policy = LlamaForCausalLM(config)
    with torch.no_grad():
        policy.lm_head.weight *= 20  # no two tokens are as likely as each other
        policy.lm_head.weight[tokenizer.eos_token_id] *= 1.7
    policy.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def pid_in(log):
    limit = time.monotonic() + 60
    while time.monotonic() < limit:
        words = log.read_text().split() if log.exists() else []
        if "pid" in words[:-1]:
            return int(words[words.index("pid") + 1])
        time.sleep(0.05)
    pytest.fail("the server did not start")


@pytest.mark.parametrize("engine", ["stand-in", pytest.param(REAL, marks=[pytest.mark.slow, needs_vllm])])
def test_samples_and_log_probs_are_those_of_transformers(
    engine, stand_in, model, tokenizer, pairs, quiet_trainer, tmp_path
):
    served_by = VLLM(stand_in if engine == "stand-in" else f"{engine} --enforce-eager", tmp_path / "logs")
    greedy = Generation(model, top_p=1e-6, max_new_tokens=8)  # so that nothing hangs on random numbers
    results = [
        JudgedReplies(greedy, tokenizer, 100, 1, 3, "sql", True, vllm).make(pairs, "replies", 4, quiet_trainer())
        for vllm in (None, served_by)
    ]
    for plain, served in zip(*results, strict=True):
        assert [reply["text"] for reply in served["replies"]] == [reply["text"] for reply in plain["replies"]]
        assert [reply["stopped"] for reply in served["replies"]] == [reply["stopped"] for reply in plain["replies"]]
        logps = [[reply["logp"] for reply in result["replies"]] for result in (served, plain)]
        assert logps[0] == pytest.approx(logps[1], abs=1e-3)
        assert served["answer"] == plain["answer"] == 1.0 and len(served["replies"]) == 3
    ended = {reply["stopped"] for result in results[0] for reply in result["replies"]}
    assert ended == {True, False}


@pytest.mark.slow
@needs_vllm
def test_vllm_samples_with_the_seed_and_the_temperature(model, tokenizer, tmp_path):
    options = {"dtype": "float32", "max_length": 64, "log": tmp_path / "log"}
    with Server(f"{REAL} --enforce-eager", model, **options) as server:

        def sample(seed, temperature):
            return server.replies([5, 6, 7], tokenizer, seed, Sampling(temperature, 1.0, 8, 8))

        first, again, other, cold = sample(1, 1.0), sample(1, 1.0), sample(2, 1.0), sample(1, 0.05)
    texts = [[reply.token_ids for reply, _ in made] for made in (first, again, other, cold)]
    different = [len({tuple(ids) for ids in made}) for made in texts]
    assert texts[0] == texts[1] != texts[2] and different[3] < different[0]
    policy = load_policy(model)
    for reply, logp in [*first, *cold]:  # at temperature 1, whatever that of the sampling
        ids = reply.token_ids + [tokenizer.eos_token_id] * reply.stopped
        logits = policy(torch.tensor([[5, 6, 7] + ids])).logits[0, 2:-1]
        expected = torch.log_softmax(logits, -1).gather(1, torch.tensor(ids)[:, None]).sum()
        assert logp == pytest.approx(expected.item(), abs=1e-3)


def test_prompts_are_cut_so_that_the_reply_has_room(stand_in, model, tokenizer, pairs, quiet_trainer, tmp_path):
    positions = load_policy(model).config.max_position_embeddings
    generation = Generation(model, top_p=1e-6, max_new_tokens=positions - 4)
    maker = JudgedReplies(generation, tokenizer, 10_000, 1, 1, "sql", vllm=VLLM(stand_in, tmp_path))
    assert len(maker.make(pairs, "replies", 4, quiet_trainer())) == len(pairs)


@pytest.mark.parametrize(
    "given, said",
    [
        ("no-such-command", "rounds.vllm: there is no command 'no-such-command': install vLLM, in an environment"),
        ("{} --trick fails", "rounds.vllm: vLLM did not start: ValueError: no such architecture (all that it printed"),
        ("{} --trick dies", "rounds.vllm: vLLM has ended: "),
    ],
)
def test_a_server_that_is_missing_fails_or_dies_is_one_line(
    given, said, stand_in, model, tokenizer, pairs, quiet_trainer, tmp_path
):
    engine = VLLM(given.format(stand_in), tmp_path / "logs")
    maker = JudgedReplies(Generation(model, max_new_tokens=8), tokenizer, 100, 1, 2, "sql", vllm=engine)
    with pytest.raises(UserError) as error:
        maker.make(pairs, "replies", 4, quiet_trainer())
    assert str(error.value).startswith(said)
    if "no-such" not in given:
        assert str(tmp_path / "logs" / "vllm.log") in str(error.value)


def test_a_quantized_model_is_refused(stand_in, model, tokenizer, pairs, quiet_trainer, tmp_path):
    generation = Generation(model, max_new_tokens=8, quantization="4bit")
    maker = JudgedReplies(generation, tokenizer, 100, 1, 2, "sql", vllm=VLLM(stand_in, tmp_path))
    with pytest.raises(UserError, match="rounds.vllm takes complete models of 16 or 32 bits"):
        maker.make(pairs, "replies", 4, quiet_trainer())


def test_the_server_ends_with_the_context(stand_in, model, tmp_path):
    with Server(stand_in, model, dtype="float32", max_length=64, log=tmp_path / "log") as server:
        pid, folder = pid_in(tmp_path / "log"), Path(server._folder)
        assert alive(pid) and folder.stat().st_mode & 0o777 == 0o700, "nobody else can ask it"
    assert gone(pid) and not folder.exists()


def test_a_killed_run_leaves_no_server(stand_in, model, tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from dpo_lightning.models.vllm import Server\n"
        "with Server(sys.argv[1], sys.argv[2], dtype='float32', max_length=64, log=Path(sys.argv[3])): time.sleep(99)"
    )
    run = subprocess.Popen([sys.executable, "-c", code, stand_in, model, str(tmp_path / "log")])
    try:
        pid = pid_in(tmp_path / "log")
        assert alive(pid)
    finally:
        run.kill()
        run.wait()
    assert gone(pid)
