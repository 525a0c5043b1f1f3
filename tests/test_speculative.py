# SPDX-License-Identifier: Apache-2.0
"""Weak to strong with drafts: the ARM's own backbone, tilted by the ARM, drafts for the base model, exactly."""

import pytest
import torch
from conftest import tiny_arm, tiny_llama
from scipy.stats import chisquare
from test_shared_forward import base_forwards

from peft_pblora import set_preference
from trl_parm import LM, PARMLogitsProcessor


PROMPT = torch.tensor([[2, 5, 3]])


def strong(vocab_size=8):
    return tiny_llama(0, vocab_size, hidden_size=48, num_attention_heads=4, num_hidden_layers=3)


def weak_arm(vocab_size=8):
    return tiny_arm(tiny_llama(1, vocab_size))


def generate(base, arm, drafts: bool, prompt=PROMPT, **settings):
    guide = PARMLogitsProcessor(arm, [0.3, 0.7], beta=0.5)
    assistant = {"assistant_model": arm.get_base_model()} if drafts else {}
    settings = {"eos_token_id": -1, "max_new_tokens": 24, **settings}
    return base.generate(
        prompt, attention_mask=torch.ones_like(prompt), logits_processor=[guide], **assistant, **settings
    )


@pytest.mark.parametrize("schedule", ["constant", "heuristic"])
@pytest.mark.parametrize("drafted", [1, 3, 6])
def test_greedy_text_is_that_of_plain_guidance(drafted, schedule):
    base, arm = strong(64), weak_arm(64)
    config = arm.get_base_model().generation_config
    config.num_assistant_tokens, config.num_assistant_tokens_schedule = drafted, schedule
    config.assistant_confidence_threshold = 0.0
    prompt = torch.tensor([[7, 8, 20, 41, 2]])
    assert torch.equal(generate(base, arm, True, prompt), generate(base, arm, False, prompt))


def exact(base, arm, ids):
    """The guided distribution of the next token in float64."""
    set_preference(arm, [0.3, 0.7])
    with torch.no_grad():
        scores = [torch.log_softmax(model(ids).logits[:, -1].double(), -1) for model in (base, arm)]
    return torch.softmax(scores[0] + scores[1] / 0.5, -1)[0]


@pytest.mark.slow
def test_sampling_is_unbiased():
    """The first two tokens of many samples, drafted and verified, against their exact joint distribution."""
    base, arm, samples = strong(), weak_arm(), 600
    config = arm.get_base_model().generation_config
    config.num_assistant_tokens, config.num_assistant_tokens_schedule = 3, "constant"
    config.assistant_confidence_threshold = 0.0
    torch.manual_seed(1)
    counts = torch.zeros(8, 8, dtype=torch.float64)
    for _ in range(samples):
        text = generate(base, arm, True, do_sample=True, top_k=0, max_new_tokens=3)[0, 3:5]
        counts[text[0], text[1]] += 1
    first = exact(base, arm, PROMPT)
    second = [exact(base, arm, torch.cat([PROMPT, torch.tensor([[token]])], 1)) for token in range(8)]
    expected = first[:, None] * torch.stack(second) * samples
    rare = expected < 5
    observed = torch.cat([counts[~rare], counts[rare].sum()[None]])
    wanted = torch.cat([expected[~rare], expected[rare].sum()[None]])
    assert chisquare(observed, wanted * samples / wanted.sum()).pvalue > 1e-3


def test_the_arm_drafts_in_one_forward_with_its_backbone(monkeypatch):
    """Each drafted token is one forward of two rows; verifying costs the ARM only the token after the last."""
    base, arm = strong(64), weak_arm(64)
    config = arm.get_base_model().generation_config
    config.num_assistant_tokens, config.num_assistant_tokens_schedule = 4, "constant"
    config.assistant_confidence_threshold = 0.0
    rounds, rows, own = [], base_forwards(arm), []
    base.register_forward_pre_hook(lambda m, args, kwargs: rounds.append(1), with_kwargs=True)
    forward = LM._forward
    monkeypatch.setattr(LM, "_forward", lambda self, *args: (own.append(args[0].shape[1]), forward(self, *args))[1])
    generate(base, arm, True, torch.tensor([[7, 8, 20, 41, 2]]))
    assert len(own) <= len(rounds)
    drafted = [count for count in rows if count == 2]
    assert len(rows) == len(drafted) + len(own)
    assert len(drafted) >= len(rounds)
