# SPDX-License-Identifier: Apache-2.0
"""The demo app without a browser, on tiny models; `test_demo_browser.py` opens it in a real one."""

import importlib.util
import itertools
import queue
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import httpx
import pytest
import torch
from byte_tokenizers import sentences
from conftest import tiny_arm, tiny_llama
from demo_folder import OBJECTIVES, save, spaced_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from peft_pblora import set_preference
from trl_parm import BASE, LM, Guided, GuidedLogitsProcessor, PARMLogitsProcessor
from trl_parm.demo import command, markup
from trl_parm.demo.answering import Answering
from trl_parm.demo.loading import load_models
from trl_parm.demo.measures import measures_of
from trl_parm.demo.picture import picture
from trl_parm.demo.questions import MOST_ENTRIES, Answer, Entry, Question, Reply, add
from trl_parm.demo.simplex import rescale, uniform
from trl_parm.evaluation.decoding import GREEDY, RowSampling
from trl_parm.noise import row_seed
from trl_parm.rewards import brevity, positivity


pytest.importorskip("gradio", reason="needs the extra `demo`")
Page = importlib.import_module("trl_parm.demo.page").Page

QUESTION = Question("w3 w9", (0.3, 0.7), beta=0.5, max_new_tokens=12, temperature=0.8, seed=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base model with an ARM on it, a smaller model with its own ARM, and a plain LoRA."""
    folder = tmp_path_factory.mktemp("demo")
    save(folder, tiny_llama(0), tiny_arm(tiny_llama(0), OBJECTIVES))
    small = {"hidden_size": 16, "intermediate_size": 24}
    save(folder, tiny_llama(5, **small), tiny_arm(tiny_llama(5, **small), OBJECTIVES, seed=5), "small", "small_arm")
    lora = get_peft_model(tiny_llama(0), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    lora.save_pretrained(folder / "lora")
    return folder


@pytest.fixture(scope="module")
def answering(folder):
    answering = Answering(load_models(str(folder / "arm"), str(folder / "base"), "float32"))
    yield answering
    answering.close()


@pytest.fixture(scope="module")
def page(answering):
    return Page(answering)


def twin(question: Question) -> tuple[str, str]:
    """Both answers by plain calls of `generate` one after the other, on models that share nothing."""
    tokenizer, arm = spaced_tokenizer(), tiny_arm(tiny_llama(0), OBJECTIVES)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": question.prompt}], add_generation_prompt=True, tokenize=False
    )
    inputs = tokenizer(text, return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    guide = GuidedLogitsProcessor(BASE + 1 / question.beta * LM(arm, question.weights))
    answers = []
    for processors in ([], [guide]):
        if question.temperature:
            seeds = [row_seed(question.seed, question.prompt)]
            processors = [*processors, RowSampling(seeds, length, temperature=question.temperature, top_k=50)]
        tokens = tiny_llama(0).generate(
            **inputs, logits_processor=processors, max_new_tokens=question.max_new_tokens, **GREEDY
        )
        answers.append(tokenizer.decode(tokens[0, length:], skip_special_tokens=True))
    return tuple(answers)


def texts(reply: Reply) -> tuple[str, str]:
    return reply.base.text, reply.guided.text


def changed(**fields) -> Question:
    return Question(**{**QUESTION.__dict__, **fields})


# Sliders


@given(
    st.lists(st.one_of(st.floats(-1, 2), st.none(), st.just(float("nan"))), min_size=1, max_size=6),
    st.integers(0, 5),
)
@settings(max_examples=60, deadline=None)
def test_sliders_stay_on_the_simplex_and_leave_the_moved_one_alone(weights, moved):
    moved %= len(weights)
    new = rescale(weights, moved)
    assert sum(round(100 * w) for w in new) == 100
    assert all(w >= 0 and w == round(w, 2) for w in new)
    if len(weights) > 1:
        given_value = weights[moved] if weights[moved] is not None and weights[moved] == weights[moved] else 0
        assert new[moved] == pytest.approx(min(1, max(0, given_value)), abs=0.0051)


@given(st.lists(st.floats(0.01, 1), min_size=3, max_size=6), st.floats(0, 1))
@settings(max_examples=30, deadline=None)
def test_the_others_keep_their_proportions(weights, value):
    weights[0] = value
    new, left = rescale(weights, 0), 1 - round(value, 2)
    for one, before in zip(new[1:], weights[1:], strict=True):
        assert one == pytest.approx(left * before / sum(weights[1:]), abs=0.011)


def test_sliders_start_uniform_and_come_back_from_a_vertex():
    assert uniform(1) == [1.0]
    assert uniform(3) == [0.34, 0.33, 0.33]
    assert rescale([0.2], 0) == [1.0]
    assert rescale([1.0, 0.0, 0.0], 0) == [1.0, 0.0, 0.0]
    assert rescale([0.4, 0.0, 0.0], 0) == [0.4, 0.3, 0.3]


def test_the_page_moves_the_other_sliders(page):
    assert page.follow(0, 0.9, 0.5) == pytest.approx(0.1)
    assert page.follow(1, 0.5, 0.2, 0.5) == [0.4, 0.4]


# Answers


@pytest.mark.parametrize("temperature", [0, 0.8])
def test_answers_are_those_of_plain_calls_of_generate(answering, temperature):
    question = changed(temperature=temperature)
    replies = list(answering.ask(question))
    assert texts(replies[-1]) == twin(question)
    assert len(set(texts(replies[-1]))) == 2  # else guidance shows nothing
    assert replies[-1].done
    assert not replies[0].done


def test_both_answers_grow_together(answering):
    question, replies = changed(temperature=0), queue.Queue()
    inputs = answering.check(question)
    answering._worker.submit(answering._answer, question, inputs, replies, threading.Event()).result()
    tokens = [(reply.base.tokens, reply.guided.tokens) for reply in replies.queue]
    assert len(tokens) > 12
    assert tokens[:4] == [(1, 1), (2, 2), (3, 3), (4, 4)]


def test_counts_tokens_and_the_time_of_each_answer(answering):
    *_, reply = answering.ask(changed(temperature=0))
    for answer in (reply.base, reply.guided):
        assert 1 <= answer.tokens <= 12
        assert answer.seconds > 0
        assert answer.speed == answer.tokens / answer.seconds


def test_token_rewards_are_the_arms_at_the_preference(answering):
    *_, reply = answering.ask(QUESTION)
    tokenizer, arm = spaced_tokenizer(), tiny_arm(tiny_llama(0), OBJECTIVES)
    set_preference(arm, QUESTION.weights)
    prompt = tokenizer("user w3 w9 <eos> assistant")["input_ids"]
    for answer in (reply.base, reply.guided):
        ids = tokenizer(answer.text)["input_ids"]
        logits = [m(torch.tensor([prompt + ids])).logits[0].log_softmax(-1) for m in (arm, tiny_llama(0))]
        ours, theirs = ([log[len(prompt) + i - 1, token].item() for i, token in enumerate(ids)] for log in logits)
        assert [t.reward for t in answer.rewards] == pytest.approx(ours, abs=1e-4)
        assert [t.log_ratio for t in answer.rewards] == pytest.approx([a - b for a, b in zip(ours, theirs)], abs=1e-4)


def test_token_rewards_are_of_the_tokens_that_were_written(tmp_path, monkeypatch):
    """With a space before the answer, too, which its text alone has lost."""
    tokenizer, size = sentences(), {"vocab_size": len(sentences())}
    save(tmp_path, tiny_llama(0, **size), tiny_arm(tiny_llama(0, **size), OBJECTIVES))
    tokenizer.save_pretrained(tmp_path / "base")  # with the chat template that is there
    answering, written = Answering(load_models(str(tmp_path / "arm"), str(tmp_path / "base"), "float32")), []
    first = tokenizer.convert_tokens_to_ids(["▁", "a"])

    def generate(question, inputs, shares, watch, most):
        for length in (1, 2):
            watch(torch.tensor([[*inputs["input_ids"][0].tolist(), *first[:length]]] * len(shares)), None)
        return torch.tensor([[*first, tokenizer.eos_token_id], [first[1], first[0], first[1]]])[: len(shares)]

    monkeypatch.setattr(answering, "_generate", generate)
    *_, reply = answering.ask(replace(QUESTION, prompt="How?"))
    for answer in (reply.base, reply.guided):
        written.append([token.token_id for token in answer.rewards])
    answering.close()
    assert (reply.base.text, reply.guided.text) == ("a", "a a")
    assert written == [first, [first[1], *first]]


def test_measures_a_known_objective_by_its_reward_and_others_by_the_arm(answering):
    *_, reply = answering.ask(QUESTION)
    arm, tokenizer = tiny_arm(tiny_llama(0), OBJECTIVES), spaced_tokenizer()
    prompt = tokenizer("user w3 w9 <eos> assistant")["input_ids"]
    ids = tokenizer(reply.guided.text)["input_ids"]
    set_preference(arm, {"helpful": 1, "brief": 0})
    logits = [m(torch.tensor([prompt + ids])).logits[0].log_softmax(-1) for m in (arm, tiny_llama(0))]
    sums = [sum(log[len(prompt) + i - 1, token].item() for i, token in enumerate(ids)) for log in logits]
    expected = (sums[0] - sums[1]) / len(ids)
    assert reply.guided.measured == pytest.approx((expected, brevity([""], [reply.guided.text])[0]), abs=1e-4)


def test_two_visitors_at_once_get_what_they_get_alone(answering):
    questions = [changed(weights=w, prompt=p) for w in ((1.0, 0.0), (0.0, 1.0)) for p in ("w3 w9", "w20")]
    alone = [twin(question) for question in questions]
    assert len(set(alone)) == 4
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda q: list(answering.ask(q))[-1], questions))
    assert [texts(reply) for reply in together] == alone


def test_no_two_forwards_run_at_once(answering):
    inside, most = set(), []
    base = answering.models.base
    before = base.register_forward_pre_hook(
        lambda *_: (inside.add(threading.get_ident()), most.append(len(inside)))[:0]
    )
    after = base.register_forward_hook(lambda *_: inside.discard(threading.get_ident()))
    try:
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(lambda seed: list(answering.ask(changed(seed=seed))), range(3)))
    finally:
        before.remove()
        after.remove()
    assert len(most) > 6
    assert max(most) == 1


def test_who_comes_later_is_told_how_many_are_ahead(answering):
    gate = threading.Event()
    answering._worker.submit(gate.wait)
    first, second = answering.ask(QUESTION), answering.ask(changed(seed=1))
    assert next(first).ahead == 0
    assert next(second).ahead == 1
    gate.set()
    assert list(first)[-1].done
    assert list(second)[-1].done


def test_closing_stops_an_answer_and_the_next_visitor_has_his(answering):
    endless = changed(max_new_tokens=256, temperature=0)
    answering.models.base.generation_config.eos_token_id = None
    calls = itertools.count()
    hook = answering.models.base.register_forward_hook(lambda *_: (next(calls), None)[1])
    try:
        replies = answering.ask(endless)
        next(replies)
        replies.close()
        assert texts(list(answering.ask(changed(max_new_tokens=2)))[-1])
        assert next(calls) < 200  # of some 500
    finally:
        hook.remove()
        answering.models.base.generation_config.eos_token_id = 1


def test_a_failure_reaches_who_asked_and_nobody_else(answering, monkeypatch):
    def broken(question, shares):
        return Guided(tiny_llama(0), BASE + LM(tiny_llama(vocab_size=32)))

    with monkeypatch.context() as patch:
        patch.setattr(answering, "_guided", broken)
        with pytest.raises(ValueError, match="vocabulary of 32"):
            list(answering.ask(QUESTION))
    assert texts(list(answering.ask(QUESTION))[-1]) == twin(QUESTION)


BAD = [
    ({"prompt": ""}, "prompt is empty"),
    ({"prompt": " \n"}, "prompt is empty"),
    ({"prompt": "w1 " * 2000}, r"2003 tokens, but at most 1024"),
    ({"prompt": "w" * 30_000}, "30000 characters, but at most 20000"),
    ({"beta": 0}, "β is 0"),
    ({"beta": -1.0}, "β is -1.0"),
    ({"beta": float("nan")}, "β is nan"),
    ({"beta": 1e-40}, "β is 1e-40, but it must be from 1e-06"),
    ({"weights": (-1.0, 2.0)}, "negative weight"),
    ({"weights": (1.0,)}, "1 entries"),
    ({"max_new_tokens": 0}, "max new tokens is 0"),
    ({"max_new_tokens": 10_000}, "from 1 to 256"),
    ({"temperature": -1}, "temperature is -1"),
    ({"temperature": float("nan")}, "temperature is nan"),
    ({"seed": -1}, "seed is -1"),
]


@pytest.mark.parametrize(("fields", "message"), BAD)
def test_bad_questions_are_refused_before_anything_is_decoded(answering, fields, message):
    with pytest.raises(ValueError, match=message):
        next(answering.ask(changed(**fields)))


def test_a_prompt_has_to_fit_into_the_context(folder):
    base = tiny_llama(0, max_position_embeddings=20)
    models = load_models(str(folder / "arm"), str(folder / "base"), "float32")
    models.base.config.max_position_embeddings = base.config.max_position_embeddings
    answering = Answering(models)
    assert len(answering.check(changed(prompt="w1 " * 5))["input_ids"][0]) == 8
    with pytest.raises(ValueError, match="9 tokens, but at most 8"):
        answering.check(changed(prompt="w1 " * 6))
    answering.close()


def test_a_prompt_has_to_fit_into_the_reward_models_context_too(folder):
    models = load_models(str(folder / "small_arm"), str(folder / "base"), "float32")
    models.arm.model.config.max_position_embeddings = 20
    answering = Answering(models)
    with pytest.raises(ValueError, match="9 tokens, but at most 8"):
        answering.check(changed(prompt="w1 " * 6))
    with pytest.raises(ValueError, match="max new tokens are 20, but all that fits is 20 tokens"):
        answering.check(changed(max_new_tokens=20))
    answering.close()


# Models


def test_an_adapter_on_a_smaller_model_guides_from_beside_the_base(folder):
    models = load_models(str(folder / "small_arm"), str(folder / "base"), "float32")
    assert models.base.config.hidden_size == 32
    assert models.arm.model.config.hidden_size == 16
    answering = Answering(models)
    reply = list(answering.ask(QUESTION))[-1]
    small = tiny_arm(tiny_llama(5, hidden_size=16, intermediate_size=24), OBJECTIVES, seed=5)
    inputs = answering.check(QUESTION)
    sampling = RowSampling([row_seed(4, "w3 w9")], inputs["input_ids"].shape[1], temperature=0.8, top_k=50)
    guide = PARMLogitsProcessor(small, QUESTION.weights, QUESTION.beta)
    tokens = tiny_llama(0).generate(**inputs, logits_processor=[guide, sampling], max_new_tokens=12, **GREEDY)
    assert reply.guided.text == spaced_tokenizer().decode(tokens[0, inputs["input_ids"].shape[1] :], True)
    answering.close()


def test_the_base_is_the_one_that_the_adapter_was_trained_on_if_none_is_given(folder):
    models = load_models(str(folder / "small_arm"), dtype="float32")
    assert models.base.config.hidden_size == 16
    assert models.objectives == OBJECTIVES


def test_an_adapter_from_another_machine_acts_on_the_base(folder, tmp_path, caplog):
    arm = tiny_arm(tiny_llama(0), OBJECTIVES)
    arm.peft_config["default"].base_model_name_or_path = "somewhere/else/entirely"
    arm.save_pretrained(tmp_path / "arm")
    models = load_models(str(tmp_path / "arm"), str(folder / "base"), "float32")
    assert "somewhere/else/entirely, which is not here" in caplog.text
    answering = Answering(models)
    assert texts(list(answering.ask(QUESTION))[-1]) == twin(QUESTION)
    answering.close()


def test_an_adapter_that_names_no_base_acts_on_the_one_that_is_given(folder, tmp_path, caplog):
    """As PEFT writes one that was made on a model in memory."""
    tiny_arm(tiny_llama(0), OBJECTIVES).save_pretrained(tmp_path / "arm")
    models = load_models(str(tmp_path / "arm"), str(folder / "base"), "float32")
    assert "arm names no base model: it acts on" in caplog.text
    answering = Answering(models)
    assert texts(list(answering.ask(QUESTION))[-1]) == twin(QUESTION)
    answering.close()
    with pytest.raises(ValueError, match=r"names no base model: .*, or give the base model \(`--model`\).$"):
        load_models(str(tmp_path / "arm"))
    with pytest.raises(ValueError, match="does not fit the model"):
        load_models(str(tmp_path / "arm"), str(folder / "small"))


def refusals(folder):
    return [
        (["--arm", str(folder / "lora")], "has no objectives: it is of type LORA"),
        (["--arm", str(folder / "nowhere")], "There is no adapter to read"),
        (["--arm", str(folder / "base")], "There is no adapter to read"),
        (["--arm", str(folder / "arm"), "--model", str(folder / "nowhere")], "There is no model to read"),
        (["--arm", str(folder / "arm"), "--beta", "0"], "`beta` is 0"),
    ]


@pytest.mark.parametrize("number", range(5))
def test_the_command_line_refuses_in_one_line(folder, capsys, number):
    argv, message = refusals(folder)[number]
    assert command.main(argv) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: ")
    assert message in said


def test_an_adapter_that_does_not_fit_is_refused(folder, tmp_path, capsys):
    arm = tiny_arm(tiny_llama(0), OBJECTIVES)
    arm.peft_config["default"].base_model_name_or_path = "somewhere/else/entirely"
    arm.save_pretrained(tmp_path / "arm")
    assert command.main(["--arm", str(tmp_path / "arm"), "--model", str(folder / "small")]) == 2
    assert "does not fit the model" in capsys.readouterr().err.strip().splitlines()[-1]


def test_without_gradio_it_says_what_to_install(monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gradio" else find(name))
    assert command.main(["--arm", "anything"]) == 2
    assert capsys.readouterr().err == "error: the demo needs gradio: pip install 'trl-parm[demo]'\n"


def test_it_listens_on_this_machine_unless_told(folder, monkeypatch):
    calls = []
    monkeypatch.setattr(Page, "launch", lambda self, *arguments: calls.append(arguments))
    arm = ["--arm", str(folder / "arm")]
    assert command.main(arm) == 0
    assert command.main([*arm, "--host", "0.0.0.0", "--port", "81", "--share"]) == 0
    assert calls == [("127.0.0.1", None, False), ("0.0.0.0", 81, True)]


# The page


def ask(page, entries, weights=(0.3, 0.7), prompt="w3 w9", beta=0.5):
    return list(page.ask(prompt, beta, 12, 0.8, 4, entries, *weights))


def test_the_page_streams_answers_and_adds_them_to_its_own_session(page):
    mine = ask(page, [])[-1]
    yours = ask(page, [], weights=(1.0, 0.0))[-1]
    assert "Done" in mine[0]
    base, guided = twin(QUESTION)
    shown = [re.sub("<[^>]+>", "", card.replace("​", "")) for card in mine[1:3]]
    assert base in shown[0]
    assert guided in shown[1]
    assert "helpful 0.30 · brief 0.70 · β 0.5" in mine[2]
    assert "tokens/s" in mine[4]
    assert [entry.weights for entry in mine[-1]] == [(0.3, 0.7)]
    assert [entry.weights for entry in yours[-1]] == [(1.0, 0.0)]
    again = ask(page, mine[-1], prompt="w20")[-1]
    assert [entry.prompt for entry in again[-1]] == ["w3 w9", "w20"]
    assert len(mine[-1]) == 1  # a session's list is never changed in place
    assert again[5].count("<circle") == 4


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"prompt": ""}, "The prompt is empty"), ({"beta": -2}, "β is -2"), ({"beta": None}, "“β” is empty"),
     ({"weights": (0, None)}, "All weights are 0")],
)  # fmt: skip
def test_the_page_says_what_is_wrong_and_leaves_the_rest_alone(page, fields, message):
    (outputs,) = ask(page, [], **fields)
    assert message in outputs[0]
    assert 'role="alert"' in outputs[0]
    assert all(isinstance(output, dict) and "value" not in output for output in outputs[1:])


def test_an_unforeseen_error_is_logged_and_not_shown(page, monkeypatch, caplog):
    def broken(question, shares):
        raise RuntimeError("a secret")

    monkeypatch.setattr(page.answering, "_guided", broken)
    outputs = ask(page, [])[-1]
    assert "Something went wrong" in outputs[0]
    assert "a secret" not in outputs[0]
    assert "a secret" in caplog.text


def test_text_of_visitors_and_models_is_escaped():
    evil = "<script>alert(1)</script>"
    entry = Entry(evil, (1.0, 0.0), 1.0, (0.0, 1.0), (1.0, 0.0))
    measures = measures_of([evil, "b"])
    parts = [
        *markup.cards(Reply(Answer(evil), Answer(evil)), evil, measures), markup.status(evil),
        markup.table([entry], [evil, "b"]), markup.explained(measures), picture([entry], [evil, "b"]),
    ]  # fmt: skip
    assert all("<script" not in part and "&lt;script&gt;" in part for part in parts)


@pytest.mark.parametrize(("k", "planes"), [(1, 1), (2, 1), (3, 3), (4, 6), (5, 4)])
def test_the_picture_has_a_plane_for_each_pair(k, planes):
    names = [f"o{i}" for i in range(k)]
    entries = [
        Entry("a", tuple(uniform(k)), 1.0, tuple(float(i) for i in range(k)), tuple(float(-i) for i in range(k))),
        Entry("b", tuple(uniform(k)), 2.0, None, tuple(0.5 for _ in range(k))),
    ]
    drawn = picture(entries, names)
    assert drawn.count("<svg") == planes
    assert drawn.count('class="base"') == planes
    assert drawn.count('class="guided') == 2 * planes
    assert "nan" not in drawn
    assert "Every answer becomes a point" in picture([Entry("a", (1.0,), 1.0, None, None)], ["o0"])


def test_the_front_joins_the_answers_that_none_beats():
    points = [(0.0, 3.0), (1.0, 1.0), (2.0, 2.0), (3.0, 0.0)]
    entries = [Entry("a", (0.5, 0.5), 1.0, None, point) for point in points]
    front = re.search(r'class="front" points="([^"]+)"', picture(entries, ["x", "y"])).group(1)
    assert len(front.split()) == 3


def test_a_session_forgets_its_oldest_answers():
    entries = []
    for seed in range(MOST_ENTRIES + 3):
        entries = add(entries, changed(prompt=str(seed)), Reply())
    assert len(entries) == MOST_ENTRIES
    assert entries[0].prompt == "3"


def test_without_vader_sentiment_is_not_measured(monkeypatch):
    assert measures_of(["positive"])[0].reward is positivity
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (measure,) = measures_of(["positive"])
    assert measure.reward is None
    assert "vaderSentiment is not installed" in measure.title
    assert "no independent judge" in markup.explained([measure])


def test_the_cost_is_the_ratio_of_the_speeds():
    reply = Reply(Answer("a", 30, 2.0), Answer("b", 20, 2.0))
    line = re.sub("<[^>]+>", " ", markup.cost(reply))
    assert "15.0  tokens/s" in line
    assert "10.0  tokens/s" in line
    assert "1.50 ×" in line
    assert "33%" in line
    assert markup.cost(Reply()) == ""


def test_two_sessions_over_http(answering):
    """The page as it is served: on loopback, for two visitors at once, each with a session of his own."""
    client = pytest.importorskip("gradio_client")
    page = Page(answering)
    url = page.launch(block=False)
    try:
        assert url.startswith("http://127.0.0.1:")
        visitors = [client.Client(url, verbose=False) for _ in range(2)]
        weights = [(1.0, 0.0), (0.0, 1.0)]
        jobs = [
            visitor.submit("w3 w9", 0.5, 12, 0.8, 4, *own, api_name="/ask") for visitor, own in zip(visitors, weights)
        ]
        for job, own in zip(jobs, weights):
            outputs = job.result(timeout=60)
            assert f"helpful {own[0]:.2f}" in outputs[2]
            assert outputs[5].count("<circle") == 2
            guided = re.sub("<[^>]+>", "", outputs[2].replace("​", ""))
            assert twin(changed(weights=own))[1] in guided
        assert "The prompt is empty" in visitors[0].predict("", 0.5, 12, 0.8, 4, 0.5, 0.5, api_name="/ask")[0]
    finally:
        page.blocks.close()


def test_the_page_takes_no_files(answering, monkeypatch, tmp_path):
    """Not by gradio's own endpoints either, which are there whether a page has a use for them or not."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    page = Page(answering)
    url = page.launch(block=False)
    try:
        for path in ("upload", "component_server", "process_recording", "queue/join", "nothing"):
            answer = httpx.post(f"{url}gradio_api/{path}", files={"files": ("a.txt", b"mine")})
            assert (answer.status_code, answer.text) == (413, "This page takes no files."), path
        mixed = {"Content-Type": "Multipart/Mixed; boundary=x"}
        assert httpx.post(f"{url}gradio_api/upload/", content=b"--x", headers=mixed).status_code == 413
        assert httpx.post(f"{url}gradio_api/upload", content=b"mine").status_code == 413
        for types in itertools.permutations(["multipart/form-data; boundary=x", "application/json"]):
            several = [("Content-Type", one) for one in types]
            assert httpx.post(f"{url}gradio_api/queue/join", content=b"{}", headers=several).status_code == 413
        long = httpx.post(f"{url}gradio_api/queue/join", json={"data": ["x" * 600_000]})
        assert (long.status_code, "at most 500000 bytes" in long.text) == (413, True)
        for headers in ({}, {"Content-Length": "1", "Transfer-Encoding": "chunked"}):
            chunks = httpx.post(f"{url}gradio_api/queue/join", content=iter([b"x"]), headers=headers)
            assert chunks.status_code == 413
        assert httpx.get(url).status_code == 200
        assert not [path for path in (tmp_path / "uploads").rglob("*") if path.is_file() and path.suffix == ".txt"]
    finally:
        page.blocks.close()
