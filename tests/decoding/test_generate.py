# SPDX-License-Identifier: Apache-2.0
"""A guided model is a model: what takes a model takes it, and its cache goes on, is copied and is told from others."""

import copy
import itertools
import threading

import pytest
import torch
from conftest import tiny_arm, tiny_gpt2, tiny_llama
from decoding.architectures import ARCHITECTURES, Cell
from decoding.tables import (
    DECODERS,
    DOORS,
    MASK,
    PROMPTS,
    ROWS,
    Decoder,
    Models,
    NaiveProcessor,
    generate,
    log_probs,
    tiny_mistral,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    DynamicCache,
    GenerationConfig,
    MiniMaxConfig,
    MiniMaxForCausalLM,
    PreTrainedTokenizerFast,
    QuantizedCache,
    TextGenerationPipeline,
    TextIteratorStreamer,
    pipeline,
)
from transformers.cache_utils import DynamicLayer, QuantizedLayer
from transformers.generation.streamers import BaseStreamer

from peft_pblora import set_preference
from peft_pblora.kv_cache import cache_argument, cache_in
from trl_parm import BASE, LM, Guided, GuidedLogitsProcessor, PARMLogitsProcessor
from trl_parm.decoding import ARGS, PARM, parm


IDS = PROMPTS[1:2]
every_place = pytest.mark.parametrize("on_base", [True, False], ids=["on the base", "apart"])


def parm_model(on_base: bool = True, preference=(0.3, 0.7)) -> Guided:
    models = Models.make(on_base)
    return PARM(models.base, models.arm, list(preference), beta=0.8)


def test_it_answers_as_a_model(tmp_path):
    guided = parm_model()
    base = guided.backbone
    for name in ("config", "device", "dtype", "generation_config", "main_input_name", "name_or_path"):
        assert getattr(guided, name) is getattr(base, name) or getattr(guided, name) == getattr(base, name)
    assert guided.can_generate()
    assert not guided.training
    assert guided.get_input_embeddings() is base.get_input_embeddings()
    assert {id(p) for p in guided.parameters()} >= {id(p) for p in base.parameters()}
    with pytest.raises(AttributeError, match="nothing_like_this"):
        guided.nothing_like_this  # noqa: B018


def test_a_generation_configuration_of_its_own_is_its_own():
    guided = parm_model()
    expected = guided.generate(IDS, max_new_tokens=3, eos_token_id=-1)
    former = guided.base.generation_config
    guided.generation_config = GenerationConfig(max_new_tokens=3, eos_token_id=-1)
    assert torch.equal(guided.generate(IDS), expected)
    assert guided.generate(IDS, max_new_tokens=4).shape == (1, 9)
    assert torch.equal(copy.deepcopy(guided).generate(IDS), expected)
    assert guided.base.generation_config is former


@every_place
def test_its_logits_are_the_formula_at_every_position(on_base):
    """Without `generate`, whole texts or step by step, and `logits_to_keep` as any model has it."""
    guided, ids = parm_model(on_base), PROMPTS[1:2]
    models = Models.make(on_base)
    expected = torch.stack(
        [
            log_probs(tiny_llama(0), ids[:, : n + 1]) + log_probs(models.arm, ids[:, : n + 1], [0.3, 0.7]) / 0.8
            for n in range(5)
        ],
        1,
    )
    expected = torch.log_softmax(expected, -1).float()
    output = guided(ids)
    torch.testing.assert_close(output.logits, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(guided(ids, logits_to_keep=2).logits, expected[:, -2:], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(guided(ids, use_cache=False).logits, expected, atol=1e-4, rtol=1e-4)
    steps, cache = [], None
    for i in range(5):
        output = guided(ids[:, i : i + 1], past_key_values=cache, use_cache=True)
        cache = cache_in(output)
        steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, 1), expected, atol=1e-4, rtol=1e-4)
    assert not output.logits.requires_grad


@every_place
def test_a_pipeline_takes_it(tokenizer, on_base):
    guided = parm_model(on_base)
    pipe = pipeline("text-generation", model=guided, tokenizer=tokenizer)
    assert isinstance(pipe, TextGenerationPipeline)
    settings = {"max_new_tokens": 6, "do_sample": False, "return_full_text": False}
    texts = [found[0]["generated_text"] for found in pipe(["w1 w2 w3", "w4"], **settings)]
    for prompt, text in zip(["w1 w2 w3", "w4"], texts):
        inputs = tokenizer(prompt, return_tensors="pt")
        ids = guided.generate(**inputs, max_new_tokens=6)[0, inputs["input_ids"].shape[1] :]
        assert text == tokenizer.decode(ids, skip_special_tokens=True)
    assert texts != [found[0]["generated_text"] for found in pipeline(
        "text-generation", model=tiny_llama(0), tokenizer=tokenizer)(["w1 w2 w3", "w4"], **settings)]  # fmt: skip


class Collect(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.tokens.append(-1)


@pytest.mark.parametrize("door", DOORS)
def test_streamers_get_the_guided_tokens(door):
    models, streamer = Models.make(), Collect()
    sequence = generate(models, DECODERS["PARM"], door, prompts=1, streamer=streamer).sequences
    assert streamer.tokens == [*sequence[0].tolist(), -1]


def test_a_text_streamer_in_a_thread(tokenizer):
    guided = parm_model()
    expected = guided.generate(IDS, max_new_tokens=6)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    thread = threading.Thread(target=guided.generate, args=(IDS,), kwargs={"max_new_tokens": 6, "streamer": streamer})
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text.split() == tokenizer.decode(expected[0, 5:]).split()


@every_place
def test_a_guided_assistant_drafts_for_a_guided_model(on_base):
    """As a model of its own, with another formula; the text is that of the large one."""
    guided, small = parm_model(on_base), PARM(tiny_llama(4), tiny_arm(tiny_llama(5)), [0.3, 0.7])
    expected = guided.generate(IDS, max_new_tokens=12, eos_token_id=-1)
    for assistant in (small, tiny_llama(4), guided, guided.backbone):
        found = guided.generate(IDS, max_new_tokens=12, eos_token_id=-1, assistant_model=assistant)
        assert torch.equal(found, expected)
    plain = tiny_llama(0).generate(IDS, max_new_tokens=12, eos_token_id=-1)
    drafted = tiny_llama(0).generate(IDS, max_new_tokens=12, eos_token_id=-1, assistant_model=small)
    assert torch.equal(drafted, plain)


def byte_tokenizer(*words: str) -> PreTrainedTokenizerFast:
    """A token for each byte, and for some words."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({token: i for i, token in enumerate(["<eos>", *alphabet])}, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.add_tokens(list(words))
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<eos>")


def test_an_assistant_with_a_tokenizer_of_its_own():
    """Its drafts are texts, and what is guided stays; a processor would be asked of the assistant's tokens."""
    ours, theirs = byte_tokenizer(), byte_tokenizer("keeper", "lamp")
    base, assistant = tiny_llama(0, len(ours)), tiny_llama(3, len(theirs))
    arm = tiny_arm(tiny_llama(1, len(ours)))
    ids = ours("the keeper lit the lamp", return_tensors="pt").input_ids
    settings = {"max_new_tokens": 8, "eos_token_id": -1, "attention_mask": torch.ones_like(ids)}
    drafts = {"tokenizer": ours, "assistant_model": assistant, "assistant_tokenizer": theirs}
    guided = PARM(base, arm, [0.9, 0.1])
    expected = guided.generate(ids, **settings)
    assert not torch.equal(expected, base.generate(ids, **settings))
    assert torch.equal(guided.generate(ids, **settings, **drafts), expected)
    with pytest.raises(ValueError, match="an assistant with a tokenizer of its own is what asks, use a guided model"):
        base.generate(ids, logits_processor=[PARMLogitsProcessor(arm, [0.9, 0.1])], **settings, **drafts)


def two_turns(guided, more=2, **settings):
    """The text of a call that goes on with another's cache, and of one that reads all anew."""
    settings = {"max_new_tokens": 4, "eos_token_id": -1, **settings}
    first = guided.generate(PROMPTS, attention_mask=MASK, return_dict_in_generate=True, **settings)
    ids = torch.cat([first.sequences, torch.full((3, more), 9)], 1)
    mask = torch.cat([MASK, torch.ones(3, ids.shape[1] - 5, dtype=torch.long)], 1)
    return ids, mask, first


@every_place
@pytest.mark.parametrize(
    ("drafts", "first"),
    [
        ("lookup", {}), pytest.param("lookup", {"prompt_lookup_num_tokens": 3}, marks=pytest.mark.slow),
        pytest.param("small", {}, marks=pytest.mark.slow), ("small", {"prompt_lookup_num_tokens": 3}),
        ("guided", {}), pytest.param("guided", {"prompt_lookup_num_tokens": 3}, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_drafts_go_on_from_a_cache_that_was_returned(drafts, first, on_base):
    """With new tokens after the text and without; the text is that of a call without a cache."""
    guided = parm_model(on_base)
    small = PARM(tiny_llama(4), tiny_arm(tiny_llama(5)), [0.3, 0.7])
    more = {
        "lookup": {"prompt_lookup_num_tokens": 3}, "small": {"assistant_model": tiny_llama(4)},
        "guided": {"assistant_model": small},
    }[drafts]  # fmt: skip
    settings = {"max_new_tokens": 8, "eos_token_id": -1, "return_dict_in_generate": True}
    for i, new in itertools.product(range(2), (0, 2)):
        start = torch.randint(2, 60, (1, 5), generator=torch.Generator().manual_seed(i))
        turn = guided.generate(start, attention_mask=torch.ones_like(start), **settings, **first)
        ids = torch.cat([turn.sequences, torch.full((1, new), 9)], 1)
        mask = torch.ones_like(ids)
        expected = guided.generate(ids, attention_mask=mask, use_cache=False, **settings).sequences
        cache = turn.past_key_values
        found = guided.generate(ids, attention_mask=mask, past_key_values=cache, **settings, **more)
        assert torch.equal(found.sequences, expected)
        ids = torch.cat([expected, expected[:, :2]], 1)  # and once more
        mask = torch.ones_like(ids)
        again = guided.generate(
            ids, attention_mask=mask, past_key_values=found.past_key_values, **settings, **more
        ).sequences
        assert torch.equal(again, guided.generate(ids, attention_mask=mask, use_cache=False, **settings).sequences)


def test_drafts_after_a_part_of_the_text_are_refused():
    guided = parm_model(True)
    turn = guided.generate(IDS, max_new_tokens=4, eos_token_id=-1, return_dict_in_generate=True)
    text, cache = turn.sequences, turn.past_key_values
    assert cache.length == text.shape[1] - 1
    for ids, columns in ((text[:, -1:], 9), (text[:, :8], 9), (text[:, :8], 8)):
        with pytest.raises(ValueError, match=f"The cache holds 8 tokens and {ids.shape[1]} were given.*needs all of"):
            guided.generate(
                ids, attention_mask=torch.ones(1, columns), past_key_values=cache, prompt_lookup_num_tokens=3
            )


@every_place
@pytest.mark.parametrize("static", [False, True], ids=["default", "static"])
def test_a_cache_that_was_returned_goes_on_with_the_next_turn(static, on_base):
    guided = parm_model(on_base)
    settings = (
        {"cache_implementation": "static", "disable_compile": True, "max_length": 5 + 4 + 2 + 4} if static else {}
    )
    if static:
        first = guided.generate(
            PROMPTS, attention_mask=MASK, eos_token_id=-1, return_dict_in_generate=True, **settings,
            stopping_criteria=[lambda ids, scores: torch.full((3,), ids.shape[1] >= 9)],
        )  # fmt: skip
        ids = torch.cat([first.sequences, torch.full((3, 2), 9)], 1)
        mask = torch.cat([MASK, torch.ones(3, 6, dtype=torch.long)], 1)
    else:
        ids, mask, first = two_turns(guided)
    cache = first.past_key_values
    copied = copy.deepcopy(cache)
    went_on, of_copy, anew = (
        guided.generate(ids, attention_mask=mask, max_new_tokens=4, eos_token_id=-1, **given)
        for given in ({"past_key_values": cache}, {"past_key_values": copied}, {})
    )
    assert torch.equal(went_on, anew)
    assert torch.equal(of_copy, anew)
    assert cache is not copied
    assert all(a.keys.data_ptr() != b.keys.data_ptr() for a, b in zip(cache.layers, copied.layers))


def test_where_the_prompt_ends_is_told_where_only_new_tokens_are_given(tokenizer):
    """To a reward of texts, as where the whole text is."""
    seen = []

    def reward(prompts, responses):
        seen.append((prompts, responses))
        return [float(len(response)) for response in responses]

    guided = ARGS(tiny_llama(0), reward, k=2, tokenizer=tokenizer)
    ids, mask, first = two_turns(guided)
    cache = cache_in(first)
    for given in (ids, ids[:, cache.get_seq_length() :]):
        read = cache_argument(guided.backbone, copy.deepcopy(cache))
        guided.generate(given, attention_mask=mask, **read, max_new_tokens=2, eos_token_id=-1)
    assert seen[-1] == seen[-3]
    assert seen[-2] == seen[-4]


@every_place
def test_a_cache_that_was_emptied_serves_another_preference(on_base):
    models = Models.make(on_base)
    guided = PARM(models.base, models.arm, beta=0.8)
    set_preference(models.arm, [1.0, 0.0])
    cache = cache_in(guided(IDS, use_cache=True))
    cache.reset()
    set_preference(models.arm, [0.0, 1.0])
    found = [guided(x, **cache_argument(models.base, cache)).logits for x in (IDS, IDS[:, :1])]
    expected = guided(torch.cat([IDS, IDS[:, :1]], 1), use_cache=False).logits
    torch.testing.assert_close(torch.cat(found, 1), expected, atol=1e-4, rtol=1e-4)
    set_preference(models.arm, [1.0, 0.0])
    with pytest.raises(ValueError, match="adapters and preferences"):
        guided(IDS[:, :1], **cache_argument(models.base, cache))


@pytest.mark.parametrize("name", ["Qwen3.5", "LFM2", "Falcon-H1", "Bamba", "Mamba"])
@pytest.mark.parametrize("mode", ["the next turn", "chunks"])
def test_texts_of_models_with_linear_attention_go_on_or_are_refused(name, mode):
    """Some forget their state where several tokens follow at once, which is found out."""
    cell = Cell.make(name, "PBLoRA", "attention", ARCHITECTURES[name].guide is None)
    guided = Guided(cell.base, cell.formula)
    settings = {"max_new_tokens": 4, "eos_token_id": -1}
    first = guided.generate(PROMPTS, attention_mask=MASK, return_dict_in_generate=True, **settings)
    ids = torch.cat([first.sequences, torch.full((3, 3), 9)], 1)
    inputs = {"input_ids": ids, "attention_mask": torch.cat([MASK, torch.ones(3, 7, dtype=torch.long)], 1)}
    read = cache_argument(cell.base, first.past_key_values)
    further = read if mode == "the next turn" else {"prefill_chunk_size": 5}
    if name in ("Bamba", "Mamba"):
        # Where a release of transformers reads no Mamba in chunks, it says so itself.
        with pytest.raises(ValueError, match="forgets what it has read where several tokens|chunking without a"):
            guided.generate(**inputs, **settings, **further)
        return
    expected = guided.generate(**inputs, **settings)
    assert torch.equal(guided.generate(**inputs, **settings, **further), expected)


@pytest.mark.parametrize("name", ["Llama", "Bamba", "Qwen3-Next", "OPT", "GPT-2"])
def test_forwards_onto_a_cache_need_neither_mask_nor_positions(name):
    cell = Cell.make(name, "PBLoRA", "attention", True)
    guided, ids = (
        Guided(cell.base, cell.formula),
        torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0)),
    )
    whole = guided(input_ids=ids, use_cache=False).logits
    cache, found = None, []
    for part in (ids[:, :6], ids[:, 6:7], ids[:, 7:8], ids[:, 8:]):
        output = guided(input_ids=part, use_cache=True, **({} if cache is None else cache_argument(cell.base, cache)))
        cache = cache_in(output)
        found.append(output.logits)
    torch.testing.assert_close(torch.cat(found, 1), whole, atol=1e-4, rtol=1e-4)


def test_a_cache_of_other_formulas_models_or_kinds_is_refused():
    guided, ids = parm_model(), PROMPTS
    ids, mask, first = two_turns(guided)
    base, arm = guided.base, guided.terms[0].model
    others = [
        PARM(base, arm, [1.0, 0.0], beta=0.8),
        Guided(base, BASE + LM(arm, disable_adapter=True)),
        PARM(tiny_llama(3), arm, [0.3, 0.7], beta=0.8),
        Guided(base, BASE + 1.25 * LM(arm, [0.3, 0.7]) + LM(tiny_gpt2(1))),
    ]
    for other in others:
        with pytest.raises(ValueError, match="was not made by a guided model with the same models, adapters and pref"):
            other.generate(ids, attention_mask=mask, past_key_values=copy.deepcopy(first.past_key_values))
    with pytest.raises(ValueError, match="This DynamicCache was not made by a guided model"):
        guided.generate(ids, attention_mask=mask, past_key_values=DynamicCache())
    stronger = PARM(base, arm, [0.3, 0.7], beta=0.1)  # β is no part of what was read
    cache = copy.deepcopy(first.past_key_values)
    assert torch.equal(
        stronger.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=3),
        stronger.generate(ids, attention_mask=mask, max_new_tokens=3),
    )
    with pytest.raises(ValueError, match="belongs to a guided model"), arm.disable_adapter():
        base.generate(ids, attention_mask=mask, past_key_values=first.past_key_values)


def test_a_preference_that_is_set_between_turns_is_noticed():
    models = Models.make(True)
    set_preference(models.arm, [1.0, 0.0])
    guided = Guided(models.base, parm(models.arm))
    ids, mask, first = two_turns(guided)
    set_preference(models.arm, [0.0, 1.0])
    with pytest.raises(ValueError, match="was not made by a guided model with the same"):
        guided.generate(ids, attention_mask=mask, past_key_values=first.past_key_values)


@every_place
def test_a_cache_is_reset_cropped_and_selected_as_any(on_base):
    guided = parm_model(on_base)
    with torch.no_grad():
        output = guided(PROMPTS, attention_mask=MASK, use_cache=True)
        cache, expected = cache_in(output), output.logits
        cache.crop(-2)
        assert cache.get_seq_length() == 3
        again = guided(PROMPTS[:, 3:], attention_mask=MASK, past_key_values=cache).logits
        torch.testing.assert_close(again, expected[:, 3:], atol=1e-4, rtol=1e-4)
        cache.batch_select_indices(torch.tensor([2, 0]))
        cache.batch_repeat_interleave(2)
        more = torch.tensor([[9], [9], [9], [9]])
        order = [2, 2, 0, 0]
        mask = torch.cat([MASK[order], torch.ones(4, 1, dtype=torch.long)], 1)
        found = guided(more, attention_mask=mask, past_key_values=cache).logits
        whole = guided(torch.cat([PROMPTS[order], more], 1), attention_mask=mask, use_cache=False).logits[:, -1:]
        torch.testing.assert_close(found, whole, atol=1e-4, rtol=1e-4)
        cache.reset()
        assert cache.get_seq_length() == 0
        again = guided(PROMPTS, attention_mask=MASK, past_key_values=cache).logits
        torch.testing.assert_close(again, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.slow  # quanto compiles its kernels
def test_a_quantised_cache():
    pytest.importorskip("optimum.quanto", reason="quantised caches need optimum-quanto")
    sizes = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2}
    models, twin = (Models.make(**sizes) for _ in range(2))
    settings = {
        "cache_implementation": "quantized", "cache_config": {"backend": "quanto", "nbits": 4}, "max_new_tokens": 8,
    }  # fmt: skip
    decoder = Decoder(lambda m: BASE + LM(m.arm, [0.3, 0.7]), lambda m, base, log_pi: base + log_pi(m.arm, [0.3, 0.7]))
    naive = twin.base.generate(
        PROMPTS, attention_mask=MASK, logits_processor=[NaiveProcessor(decoder, twin, MASK)], **settings
    )
    assert torch.equal(generate(models, decoder, "processor", **settings).sequences, naive)
    output = generate(models, decoder, "model", **settings)
    assert all(isinstance(part.cache, QuantizedCache) for part in output.past_key_values.parts)
    assert output.sequences.shape == naive.shape


def test_beams_are_refused_where_a_quantised_cache_does_not_follow_them(monkeypatch):
    pytest.importorskip("optimum.quanto", reason="quantised caches need optimum-quanto")
    monkeypatch.setattr(QuantizedLayer, "reorder_cache", DynamicLayer.reorder_cache)
    settings = {"cache_implementation": "quantized", "cache_config": {"backend": "quanto", "nbits": 4}}
    with pytest.raises(ValueError, match="Beam search with a quantised cache needs a newer transformers"):
        parm_model().generate(PROMPTS, attention_mask=MASK, num_beams=2, max_new_tokens=4, **settings)


def test_a_model_with_a_cache_of_its_own_is_read_without():
    """MiniMax's cache does not let the states of linear layers follow when rows change places."""
    torch.manual_seed(0)
    config = MiniMaxConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_local_experts=2, block_size=4, initializer_range=0.2, pad_token_id=0,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    base, arm = MiniMaxForCausalLM(config).eval(), tiny_arm()
    guided, twin = PARM(base, arm, [0.3, 0.7]), copy.deepcopy(arm)
    with pytest.raises(ValueError, match="has no cache that `generate` can carry. Pass `use_cache=False`"):
        guided.generate(IDS, max_new_tokens=2)

    def naive(ids, scores):
        return torch.log_softmax(torch.log_softmax(scores.double(), -1) + log_probs(twin, ids, [0.3, 0.7]), -1).float()

    beams = {"num_beams": 2, "use_cache": False, "max_new_tokens": 6}
    expected = base.generate(IDS, logits_processor=[naive], **beams)
    assert torch.equal(guided.generate(IDS, **beams), expected)
    assert not torch.equal(base.generate(IDS, **beams), expected)
    with pytest.raises(ValueError, match="a MiniMaxForCausalLM, which has no key-value cache"):
        LM(base)


@pytest.mark.parametrize("door", DOORS)
def test_rows_that_have_ended_do_not_disturb_the_others(door):
    models, twin = Models.make(), Models.make()
    for one in (models, twin):
        one.base.generation_config.eos_token_id = list(range(1, 24))
    decoder = Decoder(lambda m: BASE + LM(m.arm, [0.3, 0.7]), lambda m, base, log_pi: base + log_pi(m.arm, [0.3, 0.7]))
    guided = generate(models, decoder, door, max_new_tokens=24).sequences
    assert (guided[:, 5:] == 0).any(1).any()
    naive = twin.base.generate(
        PROMPTS, attention_mask=MASK, max_new_tokens=24, logits_processor=[NaiveProcessor(decoder, twin, MASK)]
    )
    assert torch.equal(guided, naive)


@pytest.mark.parametrize("mode", ["greedy", "beam search", "prompt lookup"])
@pytest.mark.parametrize("door", DOORS)
def test_a_guide_with_a_sliding_window(door, mode):
    models = Models.make()
    models.arm = tiny_mistral()
    decoder = Decoder(lambda m: BASE + LM(m.arm), lambda m, base, log_pi: base + log_pi(m.arm))
    settings = {
        "greedy": {}, "beam search": {"num_beams": 3}, "prompt lookup": {"prompts": 1, "prompt_lookup_num_tokens": 3}
    }[mode]  # fmt: skip
    guided = generate(models, decoder, door, max_new_tokens=14, **settings)
    assert torch.equal(guided.sequences, generate(models, decoder, "naive", max_new_tokens=14, **settings).sequences)


@pytest.mark.parametrize("call", ["generate_batch", "paged"])
def test_continuous_batching_is_refused(call):
    guided = parm_model()
    with pytest.raises(ValueError, match="Continuous batching .* can't be guided. Use `generate`"):
        if call == "paged":
            guided.generate(IDS, cache_implementation="paged")
        else:
            guided.generate_batch([[5, 9, 33]], generation_config=GenerationConfig(max_new_tokens=2))


@pytest.mark.parametrize("formula", [2.0 * BASE, None])
def test_labels_are_refused_since_there_is_no_loss(formula):
    guided = parm_model() if formula is None else Guided(tiny_llama(0), formula)
    with pytest.raises(ValueError, match="a guided model has no loss"):
        guided(IDS, labels=IDS)


def test_an_unknown_argument_is_told_as_by_any_model():
    with pytest.raises(ValueError, match="not used by the model: .*temprature"):
        parm_model().generate(IDS, temprature=0.3)


def test_a_front_of_preferences_is_one_call():
    """Each row at its own α; the same by both doors."""
    models = Models.make(True)
    ids = IDS.repeat(3, 1)
    front = Guided(models.base, parm(models.arm, ROWS)).generate(ids, max_new_tokens=8)
    for preference, row in zip(ROWS, front):
        alone = PARM(models.base, models.arm, preference).generate(IDS, max_new_tokens=8)
        assert torch.equal(alone[0], row[: alone.shape[1]])
    processor = PARMLogitsProcessor(models.arm, ROWS)
    assert torch.equal(models.base.generate(ids, max_new_tokens=8, logits_processor=[processor]), front)


def test_both_doors_in_one_call():
    """A guided model takes processors too, such as a guide of another kind: its formula comes first."""
    models = Models.make()
    guided = PARM(models.base, models.arm, [0.3, 0.7])
    other = GuidedLogitsProcessor(BASE + LM(models.first))
    together = guided.generate(PROMPTS, attention_mask=MASK, max_new_tokens=6, logits_processor=[other])
    at_once = Guided(models.base, parm(models.arm, [0.3, 0.7]) + LM(models.first))
    assert torch.equal(together, at_once.generate(PROMPTS, attention_mask=MASK, max_new_tokens=6))
