# SPDX-License-Identifier: Apache-2.0
"""Models with LongRoPE, which turn all keys by other factors once a text is longer than a given length: what they have
read until then is read anew, in every mode, so that texts are those of the formula in float64 without any cache."""

import pytest
import torch
from conftest import tiny_tokenizer
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM, Phi3ForSequenceClassification

from peft_pblora import PBLoraConfig, set_preference
from trl_parm import (
    ARGS,
    BASE,
    LM,
    PARM,
    Guided,
    PARMLogitsProcessor,
    Prompt,
    SequenceReward,
    SpeculativeDecoding,
    TransferQ,
)
from trl_parm.decoding.joining import Held, joined, open_cache, read
from trl_parm.decoding.prefix import turning_length
from trl_parm.evaluation.models import Models
from trl_parm.server.served import load_served


MOST, NEW, α = 16, 8, [0.3, 0.7]
SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.3, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
ROPE = {
    "rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [8.0] * 4, "rope_theta": 1e4, "factor": 4.0,
    "original_max_position_embeddings": MOST,
}  # fmt: skip


def phi(seed: int = 0, cls=Phi3ForCausalLM):
    torch.manual_seed(seed)
    config = Phi3Config(**SIZES, rope_parameters=dict(ROPE), original_max_position_embeddings=MOST)
    return cls(config).double().eval()


def llama(seed: int = 0):
    """Whose `generate` goes on from keys of both kinds, where that of Phi-3 reads the text anew."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=dict(ROPE))).double().eval()


def arm_on(model):
    torch.manual_seed(3)
    targets = ["qkv_proj"] if isinstance(model, Phi3ForCausalLM) else ["q_proj", "v_proj"]
    arm = get_peft_model(model, PBLoraConfig(objectives=["a", "b"], target_modules=targets, task_type="CAUSAL_LM"))
    for parameter in arm.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    return arm.eval()


def texts(*lengths: int) -> dict[str, torch.Tensor]:
    """Prompts of these lengths, padded on the left, of which those of one call begin alike."""
    rows = torch.randint(3, 60, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(sum(lengths)))
    rows[:, :10] = rows[0, :10].clone()
    mask = torch.stack([torch.arange(max(lengths)) >= max(lengths) - length for length in lengths]).long()
    return {"input_ids": rows * mask, "attention_mask": mask}


@torch.no_grad()
def naive(make, ids, mask, new: int = NEW, own=None):
    """Greedy text of PARM by whole texts, in float64. Each row's keys are turned by the longest text of the batch, as
    those of a batch are."""
    base, arm = make(), arm_on(make())
    set_preference(arm, α)
    written = ids[:, :0]
    for _ in range(new):
        total = 0
        for model, (prompt, seen) in ((base, (ids, mask)), (arm, own or (ids, mask))):
            text = torch.cat([prompt, written], 1)
            whole = torch.cat([seen, torch.ones_like(written)], 1)
            positions = (whole.cumsum(-1) - 1).clamp(min=0)
            logits = model(text, attention_mask=whole, position_ids=positions, use_cache=False).logits[:, -1]
            total = total + logits.log_softmax(-1)
        written = torch.cat([written, total.argmax(-1)[:, None]], 1)
    return written.tolist()


def written(model, given, **settings):
    settings = {"max_new_tokens": NEW, "do_sample": False, **settings}
    return model.generate(**given, **settings)[:, given["input_ids"].shape[1] :].tolist()


LENGTHS = [(5,), (10,), (14,), (15,), (16,), (20,), (14, 11), (20, 18), (12, 12)]


@pytest.mark.parametrize("make", [phi, llama])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_texts_across_the_length_are_those_of_the_formula(make, lengths):
    given = texts(*lengths)
    expected = naive(make, *given.values())
    arm = arm_on(make())
    base = arm.get_base_model()
    doors = {
        "one forward": written(PARM(base, arm, α), given),
        "two models": written(PARM(make(), arm, α), given),
        "a processor": written(make(), given, use_cache=False, logits_processor=[PARMLogitsProcessor(arm, α)]),
    }
    drafted = (
        {}
        if len(lengths) > 1 and max(lengths) <= MOST
        else {
            "drafts of the prompt": written(
                PARM(base, arm, α), given, custom_generate=SpeculativeDecoding("prompt", draft_tokens=3)
            ),
            "drafts of a model": written(
                PARM(make(), arm, α), given, custom_generate=SpeculativeDecoding("auto", draft_tokens=3)
            ),
            "drafts of another model": written(
                PARM(base, arm, α), given, custom_generate=SpeculativeDecoding(llama(9), draft_tokens=2)
            ),
        }
    )
    doors |= drafted
    assert doors == dict.fromkeys(doors, expected)


@pytest.mark.parametrize("make", [phi, llama])
@pytest.mark.parametrize("lengths", [(18, 5), (20, 8), (14, 5)], ids=str)
def test_a_row_that_has_ended_turns_the_others_all_the_same(make, lengths):
    given, arm, ended = texts(*lengths), arm_on(make()), 0
    guided = PARM(arm.get_base_model(), arm, α)
    plain = written(guided, given, max_new_tokens=12)
    for end in {*plain[0][1:8]} - {*plain[1][:8]}:
        settings = {"max_new_tokens": 12, "eos_token_id": end, "pad_token_id": 0}
        expected = written(guided, given, use_cache=False, **settings)
        assert written(guided, given, end_tokens=[end], **settings) == expected == written(guided, given, **settings)
        ended += 1
    assert ended


@pytest.mark.parametrize("make", [phi, llama])
def test_rollouts_of_a_policy_across_the_length(make):
    policy, seen = make(4), []

    def reward(ids, mask):
        seen.append(ids)
        return torch.zeros(len(ids))

    given = texts(10)
    written(TransferQ(make(), SequenceReward(reward), policy, k=3, rollout_tokens=4), given)
    assert [len(ids[0]) for ids in seen] == list(range(15, 15 + NEW))
    for ids in seen:
        start = ids[:, :-4]
        expected = policy.generate(
            start, attention_mask=torch.ones_like(start), max_new_tokens=4, do_sample=False, use_cache=False
        )
        assert torch.equal(ids, expected)


def test_keys_of_both_kinds_write_another_text():
    """What the tests above would not see if it were not so."""
    given = texts(12)
    model = llama()
    assert written(model, given) != written(model, given, use_cache=False)


@pytest.mark.parametrize("own_length", [3, 13, 20])
@pytest.mark.parametrize("length", [5, 12, 20])
def test_a_guide_with_a_prompt_of_its_own_turns_by_its_own_length(length, own_length):
    given, guide = texts(length), texts(own_length)
    expected = naive(phi, *given.values(), own=tuple(guide.values()))
    arm = arm_on(phi())
    prompt = Prompt(given, guide=guide)
    assert written(PARM(phi(), arm, α), {**given, **prompt.arguments}) == expected
    assert written(PARM(arm.get_base_model(), arm, α), {**given, **prompt.arguments}) == expected
    processor = PARMLogitsProcessor(arm, α, prompt=prompt)
    assert written(phi(), given, use_cache=False, logits_processor=[processor]) == expected
    speculative = SpeculativeDecoding("prompt", draft_tokens=3)
    assert written(PARM(phi(), arm, α), {**given, **prompt.arguments}, custom_generate=speculative) == expected


def test_beams_and_text_that_goes_on():
    given, arm = texts(13), arm_on(phi())
    guided = PARM(arm.get_base_model(), arm, α)
    uncached = written(guided, given, num_beams=3, use_cache=False)
    assert written(guided, given, num_beams=3) == uncached
    first = guided.generate(**given, max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
    ids = torch.cat([first.sequences, torch.tensor([[7, 9]])], 1)
    later = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert written(guided, later, past_key_values=first.past_key_values) == naive(phi, *later.values())


@pytest.mark.parametrize("door", ["model", "processor"])
def test_weights_of_a_lora_turn_too(door):
    torch.manual_seed(5)
    model = get_peft_model(phi(), LoraConfig(r=2, target_modules=["qkv_proj"], task_type="CAUSAL_LM"))
    torch.nn.init.normal_(next(p for n, p in model.named_parameters() if "lora_B" in n), std=0.5)
    model.eval()
    formula, given, base = BASE + 0.5 * LM(model), texts(13, 9), model.get_base_model()
    expected = written(Guided(base, formula), given, use_cache=False)
    if door == "model":
        assert written(Guided(base, formula), given) == expected
    else:
        processor = PARMLogitsProcessor(model, beta=2.0)
        for _ in range(2):
            assert written(base, given, use_cache=False, logits_processor=[processor]) == expected


def test_a_classifier_reads_candidates_beyond_the_length_as_whole_texts():
    torch.manual_seed(1)
    judge, base, given = phi(7, Phi3ForSequenceClassification), phi(), texts(12)
    judge.config.pad_token_id = 0
    guided = ARGS(base, judge, weight=3.0, k=4)
    ids = given["input_ids"]
    with torch.no_grad():
        for _ in range(NEW):
            log_pi = base(ids, use_cache=False).logits[:, -1].log_softmax(-1)
            best = log_pi.topk(4).indices[0]
            rewards = torch.stack(
                [judge(torch.cat([ids, v.view(1, 1)], 1), use_cache=False).logits[0, 0] for v in best]
            )
            ids = torch.cat([ids, best[(log_pi[0, best] + 3.0 * rewards.float()).argmax()].view(1, 1)], 1)
    assert written(guided, given) == ids[:, 12:].tolist()


def test_what_would_be_read_by_two_kinds_of_factors_is_refused():
    arm = arm_on(phi())
    guided = PARM(arm.get_base_model(), arm, α)
    message = "Phi3ForCausalLM turns its keys by other factors in texts of more than 16 tokens"
    with pytest.raises(ValueError, match=message):
        written(guided, texts(20), prefill_chunk_size=6)
    with pytest.raises(ValueError, match=message):
        written(guided, texts(12), assistant_model=phi(2))
    assert written(guided, texts(5), prefill_chunk_size=2) == naive(phi, *texts(5).values())
    rows = texts(14, 11)
    with pytest.raises(
        ValueError, match="2 tokens after these prompts, in all rows at once.*Decode the 2 rows one at a"
    ):
        written(guided, rows, custom_generate=SpeculativeDecoding("prompt"))
    short = written(guided, rows, max_new_tokens=2)
    assert written(guided, rows, max_new_tokens=2, custom_generate=SpeculativeDecoding("prompt")) == short
    embed = guided.get_input_embeddings()
    for length, new, refused in ((12, 8, True), (12, 4, False), (20, 8, False)):
        given = texts(length)
        embeds = {"inputs_embeds": embed(given["input_ids"]).detach(), "attention_mask": given["attention_mask"]}
        settings = {"max_new_tokens": new, "do_sample": False}
        if refused:
            with pytest.raises(ValueError, match="of more than 16 tokens, .* which `inputs_embeds` don't allow"):
                guided.generate(**embeds, **settings)
        else:
            assert guided.generate(**embeds, **settings).tolist() == naive(phi, *given.values(), new=new)
    cache, ids = open_cache(guided), texts(20)["input_ids"]
    guided(input_ids=ids[:, :15], past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match=message):
        guided(input_ids=ids[:, 15:], past_key_values=cache, use_cache=True)


def test_served_texts_end_at_the_length(tmp_path):
    """Beyond it all texts of a batch would have to be read anew."""
    phi().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert load_served(Models(str(tmp_path)), []).named("base").positions == MOST


def test_joined_texts_are_turned_as_they_were_read():
    arm = arm_on(phi())
    one = PARM(arm.get_base_model(), arm, α)
    for length in (9, 18):
        given = texts(length, length - 3)
        caches = []
        for ids, mask in zip(given["input_ids"], given["attention_mask"]):
            caches.append(open_cache(one))
            read(one, caches[-1], ids[mask.bool()][None], [0])
        lengths = given["attention_mask"].sum(1).tolist()
        held = [Held(cache, [0], [n]) for cache, n in zip(caches, lengths)]
        last = torch.tensor([[5], [6]])
        if length < MOST:
            both = joined(one, held)
            found = read(one, both, last, [0, 3])
            expected = [read(one, cache, last[i : i + 1], [0]) for i, cache in enumerate(caches)]
            assert torch.allclose(found, torch.cat(expected))
        else:  # the shorter one, of 15 tokens, was read by other factors than the longer one
            with pytest.raises(ValueError, match="shorter and longer ones can't be put side by side"):
                joined(one, held)


def test_the_length_is_known_by_the_configuration():
    assert turning_length(phi()) == turning_length(arm_on(llama()).get_base_model()) == MOST
    config = LlamaConfig(**SIZES, rope_parameters={"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4,
                                                   "original_max_position_embeddings": 32})  # fmt: skip
    assert turning_length(LlamaForCausalLM(config)) is None
