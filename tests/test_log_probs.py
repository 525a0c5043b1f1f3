# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of responses: chunked, from logits, with shared prompts; against a forward for each token."""

from functools import partial

import pytest
import torch
from conftest import tiny_arm, tiny_gpt2, tiny_llama
from pair_data import naive_log_probs
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MptConfig,
    MptForCausalLM,
)

from peft_pblora import set_preference
from trl_parm import PreferenceARMConfig
from trl_parm.training.data import PreferenceCollator
from trl_parm.training.layout import Predictions, dense_places, separate_rows, shared_prompts
from trl_parm.training.log_probs import LOGITS_AT_ONCE, ResponseLogProbs, Responses, token_log_probs


PAIRS = [([5, 6, 7], [8, 9, 1], [9, 1]), ([5], [10, 11, 12, 13, 1], [3]), ([2, 3, 4, 5, 6], [7], [8, 4, 4, 1])]


def batch(share_prompt: bool = False, rows=PAIRS) -> dict[str, torch.Tensor]:
    pairs = [
        {"prompt_ids": p, "first_ids": a, "second_ids": b, "labels": [1, 0], "pair_id": i}
        for i, (p, a, b) in enumerate(rows)
    ]
    return PreferenceCollator(0, share_prompt=share_prompt)([{"pairs": pairs}])


def args(**changes) -> PreferenceARMConfig:
    return PreferenceARMConfig("unused", bf16=False, use_cpu=True, report_to="none", **changes)


def adapted_head() -> nn.Module:
    model = get_peft_model(
        tiny_llama(), LoraConfig(r=2, target_modules=["lm_head", "q_proj"], init_lora_weights=False)
    )
    return model.train()


def altered(model: nn.Module, change) -> nn.Module:
    """A model that changes its logits after the head."""
    forward = model.forward

    def altered_forward(*given, **kwargs):
        output = forward(*given, **kwargs)
        output.logits = change(output.logits)
        return output

    model.forward = altered_forward
    return model


def masked(logits: torch.Tensor) -> torch.Tensor:
    logits[..., 40:] = -torch.inf
    return logits


AFTER_THE_HEAD = {
    "scaled": lambda logits: logits * 0.5,  # as Cohere and Granite do
    "capped": lambda logits: 5 * torch.tanh(logits / 5),
    "cut": lambda logits: logits[..., :50],  # as Inkling does
    "masked": masked,  # as Chameleon does
    "biased": lambda logits: logits + torch.eye(64)[5],
}


MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2, "arm": tiny_arm, "adapted head": adapted_head}
every_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


@every_model
@pytest.mark.parametrize("share_prompt", [False, True])
@pytest.mark.parametrize("way", ["chunked", "from logits"])
def test_log_probs_equal_the_naive_twin(make, share_prompt, way):
    model = make().requires_grad_(False).eval()
    responses = Responses(model, args(share_prompt=share_prompt))
    if way == "from logits":
        responses._sums.head = None
    first, second = responses.log_probs(model, batch(share_prompt))
    expected = torch.tensor([[naive_log_probs(model, p, r) for r in (a, b)] for p, a, b in PAIRS])
    torch.testing.assert_close(torch.stack([first, second], 1), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("make", [tiny_arm, adapted_head])
@pytest.mark.parametrize("share_prompt", [False, True])
@pytest.mark.parametrize("chunk", [64, 192, 2**22])
def test_gradients_equal_those_of_plain_log_softmax(make, share_prompt, chunk, monkeypatch):
    monkeypatch.setitem(LOGITS_AT_ONCE, "cpu", chunk)
    model = make().train()
    if make is tiny_arm:
        set_preference(model, [0.3, 0.7])
    given = batch(share_prompt)
    inputs, predictions = shared_prompts(given, None) if share_prompt else separate_rows(given)
    gradients = []
    for way in ("ours", "naive"):
        model.zero_grad()
        if way == "ours":
            sums = ResponseLogProbs(model)(model, inputs, predictions)
        else:
            log_probs = model(**inputs).logits.log_softmax(-1)[predictions.rows, predictions.positions]
            sums = predictions.sum(log_probs.gather(-1, predictions.targets[:, None])[:, 0])
        (sums * torch.linspace(-1, 2, len(sums))).sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("bias", [False, True])
def test_token_log_probs_pass_the_gradient_check(bias):
    torch.manual_seed(0)
    hidden = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    weight, shift = torch.randn(7, 4, dtype=torch.float64), torch.randn(7, dtype=torch.float64) if bias else None
    targets = torch.tensor([0, 6, 2, 2, 5])
    # The sums are float32, whatever goes in.
    assert torch.autograd.gradcheck(
        lambda h: token_log_probs(h, weight, shift, targets).double(), hidden, eps=1e-2, atol=1e-3
    )
    logits = hidden @ weight.T + (0 if shift is None else shift)
    expected = logits.log_softmax(-1)[torch.arange(5), targets].float()
    torch.testing.assert_close(token_log_probs(hidden, weight, shift, targets), expected)


def test_the_chunked_way_never_holds_the_logits_of_all_tokens():
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, given=(), kwargs=None):
            output = function(*given, **(kwargs or {}))
            sizes.append(output.numel() if isinstance(output, torch.Tensor) else 0)
            return output

    model = get_peft_model(tiny_llama(vocab_size=4000), LoraConfig(r=2, target_modules=["q_proj"])).train()
    rows = [([5, 6], list(range(2, 62)), list(range(3, 63))) for _ in range(8)]
    inputs, predictions = separate_rows(batch(rows=rows))
    chunked_way = ResponseLogProbs(model)
    before = LOGITS_AT_ONCE["cpu"]
    LOGITS_AT_ONCE["cpu"] = 4000 * 50
    try:
        with Watch():
            chunked_way(model, inputs, predictions).sum().backward()
    finally:
        LOGITS_AT_ONCE["cpu"] = before
    assert chunked_way.head is not None
    assert max(sizes) <= 4000 * 50 < len(predictions.targets) * 4000 / 10


@pytest.mark.parametrize("change", AFTER_THE_HEAD.values(), ids=AFTER_THE_HEAD)
@pytest.mark.parametrize("rows", [PAIRS, PAIRS * 16], ids=["few", "more than tokens"])
def test_a_model_that_changes_its_logits_after_the_head_is_noticed(change, rows):
    model = altered(tiny_llama().requires_grad_(False), change)
    inputs, predictions = separate_rows(batch(rows=rows))
    way = ResponseLogProbs(model)
    expected = [naive_log_probs(model, p, pair[side]) for side in (0, 1) for p, *pair in rows[:3]]
    for _ in range(2):
        found = way(model, inputs, predictions).unflatten(0, (2, -1))[:, :3].flatten()
        torch.testing.assert_close(found, torch.tensor(expected), atol=1e-4, rtol=1e-5)
    assert way.head is None
    assert not model.lm_head._forward_hooks
    assert not model.lm_head._forward_pre_hooks


@pytest.mark.parametrize("rows", [PAIRS, PAIRS * 16], ids=["few", "more than tokens"])
def test_a_model_that_leaves_its_logits_as_they_are_is_read_by_one_forward_each_time(rows):
    fed = []
    model = altered(tiny_llama().requires_grad_(False), lambda logits: fed.append(logits.numel()) or logits[..., :64])
    inputs, predictions = separate_rows(batch(rows=rows))
    ways = ResponseLogProbs(model), ResponseLogProbs(model, chunked=False)
    for _ in range(2):
        fed.clear()
        found = ways[0](model, inputs, predictions)
        assert fed == [64 if rows is PAIRS else 128]
        torch.testing.assert_close(found, ways[1](model, inputs, predictions), atol=1e-4, rtol=1e-5)
    assert ways[0].head is not None


class AllLogits(nn.Module):
    """A model of somebody's own, whose forward gives the logits of so many positions whatever it is asked for."""

    def __init__(self, count: int | None = None) -> None:
        super().__init__()
        self.model, self.count = tiny_llama().requires_grad_(False), count

    def forward(self, input_ids, attention_mask=None, **kwargs):
        output = self.model(input_ids=input_ids, attention_mask=attention_mask)
        output.logits = output.logits[:, : self.count] * 2
        return output

    def get_output_embeddings(self):
        return self.model.lm_head


def test_a_model_that_does_not_know_logits_to_keep():
    rows = [PAIRS[0], PAIRS[2]]  # none of which has a response at its first token
    inputs, predictions = separate_rows(batch(rows=rows))
    model = AllLogits()
    expected = [naive_log_probs(model, p, pair[side]) for side in (0, 1) for p, *pair in rows]
    found = ResponseLogProbs(model)(model, inputs, predictions)
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-4, rtol=1e-5)
    other = AllLogits(2)
    with pytest.raises(ValueError, match=r"gave logits for 2 positions, but it was asked for 6 of 9 by `logits_to_k"):
        ResponseLogProbs(other, chunked=False)(other, inputs, predictions)


def test_hooks_leave_with_an_error():
    model = tiny_llama().requires_grad_(False)
    inputs, predictions = separate_rows(batch())
    with pytest.raises(IndexError, match="out of range"):
        ResponseLogProbs(model)(model, {**inputs, "input_ids": inputs["input_ids"] + 64}, predictions)
    assert not model.lm_head._forward_hooks
    assert not model.lm_head._forward_pre_hooks


def test_a_trained_or_adapted_head_takes_the_other_way():
    assert ResponseLogProbs(tiny_llama()).head is None
    assert ResponseLogProbs(adapted_head()).head is None
    assert ResponseLogProbs(tiny_arm()).head is not None


def test_without_a_prompt_the_first_token_has_no_predictor():
    model = tiny_llama().requires_grad_(False)
    rows = [([], [8, 9, 1], [9, 1])]
    for share_prompt in (False, True):
        responses = Responses(model, args(share_prompt=share_prompt))
        first, second = responses.log_probs(model, batch(share_prompt, rows))
        expected = [naive_log_probs(model, [], [8, 9, 1]), naive_log_probs(model, [], [9, 1])]
        assert [first.item(), second.item()] == pytest.approx(expected, abs=1e-4)


def test_normalised_log_probs_are_means_of_a_token():
    model = tiny_arm()
    set_preference(model, [0.5, 0.5])
    sums = Responses(model, args()).log_probs(model, batch())
    means = Responses(model, args(length_normalized=True)).log_probs(model, batch())
    torch.testing.assert_close(means[0], sums[0] / torch.tensor([3, 5, 1]))
    torch.testing.assert_close(means[1], sums[1] / torch.tensor([2, 1, 4]))


def test_shared_prompts_do_not_see_the_other_response():
    given = batch(share_prompt=True)
    inputs, _ = shared_prompts(given, None)
    mask, segments = inputs["attention_mask"][:, 0], given["segments"]
    for row in range(3):
        for query in range(mask.shape[1]):
            for key in range(mask.shape[1]):
                s, t = segments[row, query].item(), segments[row, key].item()
                if s == -1:  # what padding sees is nobody's business
                    continue
                allowed = key == query or (key < query and t != -1 and not (s == 2 and t == 1))
                assert mask[row, query, key].item() == allowed
    assert inputs["position_ids"][0].tolist()[:8] == [0, 1, 2, 3, 4, 5, 3, 4]


def random_pairs(seed: int, common: int) -> list[tuple[list[int], list[int], list[int]]]:
    """Seven pairs of unlike lengths, whose prompts have so many tokens at their start in common."""
    draw = torch.Generator().manual_seed(seed)

    def ids(least: int, most: int) -> list[int]:
        return torch.randint(2, 14, (int(torch.randint(least, most, (), generator=draw)),), generator=draw).tolist()

    start = torch.randint(2, 14, (common,), generator=draw).tolist()
    pairs = [(start + ids(0, 9) + [14], ids(1, 12), ids(1, 12)) for _ in range(6)]
    return [*pairs, (pairs[0][0], ids(1, 30), ids(1, 3))]  # a prompt twice, and a long answer


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_arm])
@pytest.mark.parametrize("common", [0, 1, 7])
@pytest.mark.parametrize("settings", [{}, {"pad_to_multiple_of": 16}, {"max_length": 40}], ids=str)
def test_pairs_in_dense_rows_have_the_log_probs_and_gradients_of_separate_ones(make, common, settings):
    model, pairs = make().eval(), random_pairs(common, common)
    if make is tiny_arm:
        set_preference(model, [0.3, 0.7])
    found, fed = [], []

    def feed(*given, **kwargs):
        fed.append(kwargs["input_ids"].shape)
        return model(*given, **kwargs)

    for share in (False, True):
        model.zero_grad()
        log_probs = Responses(model, args(share_prompt=share, **settings)).log_probs(feed, batch(share, pairs))
        (log_probs * torch.linspace(-1, 2, log_probs.numel()).view_as(log_probs)).sum().backward()
        found.append(
            (log_probs.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        )
    torch.testing.assert_close(found[0], found[1], atol=2e-5, rtol=1e-4)
    length = max(len(prompt) + len(first) + len(second) for prompt, first, second in pairs)
    rows, columns = fed[1]
    assert rows * columns < len(pairs) * length
    assert rows < len(pairs)
    assert columns % settings.get("pad_to_multiple_of", 1) == 0
    assert columns <= max(length, settings.get("max_length", 10**6))


def test_rows_stay_apart_where_each_pair_has_a_preference_of_its_own():
    fed = []

    def feed(*given, **kwargs):
        fed.append(kwargs["input_ids"].shape)
        return model(*given, **kwargs)

    model, pairs = tiny_llama(), random_pairs(0, 3)
    Responses(model, args(share_prompt=True, preference_per="pair")).log_probs(feed, batch(True, pairs))
    assert fed[0][0] == len(pairs)


def test_dense_places_hold_every_token_once_and_the_common_start_once_in_a_row():
    for seed in range(20):
        given = batch(True, random_pairs(seed, seed % 4))
        places = dense_places(given, width=16)
        inputs, _ = shared_prompts(given, None, places)
        tokens = (given["segments"] != -1).sum().item()
        pairs = len(given["input_ids"])
        held = inputs["attention_mask"].diagonal(dim1=-2, dim2=-1)  # each sees itself
        assert held.all()
        assert places.common >= seed % 4
        filled = places.fill(torch.ones_like(given["input_ids"]), given["segments"])
        assert filled.sum().item() == tokens - (pairs - places.count) * places.common


def test_shared_prompts_need_attention_that_follows_a_mask():
    model = tiny_llama(attn_implementation="flex_attention")
    with pytest.raises(ValueError, match="needs attention that takes a mask, but the model uses 'flex_attention'"):
        Responses(model, args(share_prompt=True))
    model = tiny_llama()
    model.config.layer_types = ["sliding_attention", "full_attention"]
    with pytest.raises(ValueError, match="needs attention to all tokens"):
        Responses(model, args(share_prompt=True))


def without_mask():
    model = tiny_llama()
    forward = model.forward
    model.forward = lambda *given, attention_mask=None, **kwargs: forward(*given, **kwargs)
    return model


def gpt_neo():
    """Half of its layers see four tokens only, which its configuration calls neither a window nor a type of layer."""
    torch.manual_seed(0)
    config = GPTNeoConfig(
        vocab_size=64, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]],
        window_size=4, max_position_embeddings=64,
    )  # fmt: skip
    return GPTNeoForCausalLM(config)


def bloom():
    torch.manual_seed(0)
    return BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4))


def mpt(longest=2048):
    """It takes its positions from the order of tokens."""
    torch.manual_seed(0)
    return MptForCausalLM(MptConfig(vocab_size=64, d_model=32, n_layers=2, n_heads=4, max_seq_len=longest))


def mamba():
    torch.manual_seed(0)
    return MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (without_mask, "it does not follow mask and positions"),
        (gpt_neo, "it does not follow mask and positions"),
        (mpt, "it does not follow mask and positions"),
        (partial(mpt, 32), "which the model can't take: RuntimeError: The size of tensor"),
        (mamba, "needs attention to all tokens, but the model has ..linear_attention.."),
        (bloom, "which the model can't take: ValueError: too many values to unpack"),
    ],
)
def test_a_model_that_can_not_share_prompts_is_refused(make, message):
    model = make().requires_grad_(False).train()
    with pytest.raises(ValueError, match=f"`share_prompt=True`.*{message}.* Use `share_prompt=False`"):
        Responses(model, args(share_prompt=True, max_length=40)).check_shared_prompts(model, batch(share_prompt=True))
    assert model.training


@every_model
@pytest.mark.parametrize("max_length", [None, 40, 1024])
def test_a_model_that_follows_the_mask_may_share_prompts(make, max_length):
    model = make().requires_grad_(False)
    responses = Responses(model, args(share_prompt=True, max_length=max_length))
    responses.check_shared_prompts(model, batch(share_prompt=True))


def test_predictions_of_rows():
    inputs, predictions = separate_rows(batch())
    assert isinstance(predictions, Predictions)
    assert predictions.count == 6
    assert predictions.lengths().tolist() == [3, 5, 1, 2, 1, 4]
    assert predictions.targets[predictions.groups == 0].tolist() == [8, 9, 1]
    assert predictions.positions[predictions.groups == 0].tolist() == [2, 3, 4]
