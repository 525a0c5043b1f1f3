# SPDX-License-Identifier: Apache-2.0
"""What results depend on is in their record: code, values, packages, models and how they are loaded."""

import functools
import json
import logging
import re
import sys
from collections import deque
from decimal import Decimal
from functools import partial

import numpy as np
import pytest
import torch
from conftest import tiny_arm, tiny_llama, tiny_tokenizer
from datasets import Dataset
from transformers import AutoModelForCausalLM

from trl_parm.decoding import MOD
from trl_parm.evaluation import Run, sweep
from trl_parm.evaluation.evaluate import evaluate
from trl_parm.evaluation.models import Models
from trl_parm.identity import describe_model, hash_weights
from trl_parm.records import differences
from trl_parm.relabel import relabel
from trl_parm.reward_models import RewardSource
from trl_parm.rewards import brevity, conciseness, positivity
from trl_parm.sources import STATE, describe_function


MINE = """
import re
import helpers
from helpers import Scale
LIMIT = 3
WORDS = {"good": 1.0}
END = re.compile("x")
seen = []
def unused(): return 1
def inner(text): return len(text) * LIMIT
def count(prompts, responses, weight=2.0):
    import lazily
    seen.extend(responses)
    return [weight * inner(r) * WORDS.get(r, 1.0) * helpers.factor() * Scale()(r) + lazily.zero() for r in responses]
def other(prompts, responses):
    return [float(bool(END.search(r))) for r in responses]
"""
HELPERS = """
SIZE = 2.0
def factor(): return SIZE
class Base:
    def __call__(self, text): return self.scale(text)
class Scale(Base):
    def scale(self, text): return 1.0
"""
LAZILY = "def zero(): return 0.0\n"


def describe(folder, monkeypatch, name="mine:count", **changes):
    """The description of a function whose modules are written anew, with texts in the place of others."""
    with monkeypatch.context() as patch:
        patch.syspath_prepend(str(folder))
        for module, text in (("mine", MINE), ("helpers", HELPERS), ("lazily", LAZILY)):
            for old, new in changes.items():
                text = text.replace(*new) if old == module else text
            (folder / f"{module}.py").write_text(text)
            sys.modules.pop(module, None)
        found = RewardSource(name).configuration()
        for module in ("mine", "helpers", "lazily"):
            sys.modules.pop(module, None)
    return found


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"mine": ("weight * inner", "1 + weight * inner")}, "mine:count "),
        ({"mine": ("len(text) *", "len(text) +")}, "mine:inner "),
        ({"mine": ("LIMIT = 3", "LIMIT = 4")}, "mine:inner.LIMIT was 3, but is 4"),
        ({"mine": ('"good": 1.0', '"good": 2.0')}, "mine:count.WORDS was "),
        ({"mine": ("weight=2.0", "weight=3.0")}, "mine:count.weight was 2.0, but is 3.0"),
        ({"helpers": ("return SIZE", "return 2 * SIZE")}, "helpers "),
        ({"helpers": ("SIZE = 2.0", "SIZE = 3.0")}, "helpers "),
        ({"helpers": ("return self.scale", "return -self.scale")}, "helpers:Base "),
        ({"lazily": ("return 0.0", "return 1.0")}, "lazily "),
        ({"mine": ("seen = []", "seen = [1]")}, None),
        ({"mine": ("def unused(): return 1", "def unused(): return 2")}, None),
        ({"mine": ('compile("x")', 'compile("y")')}, None),
    ],
)
def test_an_edit_anywhere_that_counts_is_seen(tmp_path, monkeypatch, changes, part):
    """And one elsewhere, in the same file too, is not."""
    before = describe(tmp_path, monkeypatch)
    found = differences(before, describe(tmp_path, monkeypatch, **changes))
    assert all(text.startswith("parts ") for text in found)
    assert (part is None) == (not found)
    assert part is None or any(text.startswith(f"parts {part}") for text in found), found
    assert before["parts"]["mine:count.seen"] == STATE
    assert json.loads(json.dumps(before)) == before


STORING = """
MARKS = ".,"
COUNTS, CACHE = {}, {}
def vowels(prompts, responses):
    seen = {}
    for text in responses:
        seen[text.strip(MARKS)] = True
        CACHE[text.strip(MARKS)] = COUNTS[text] = 1
        COUNTS[text] += 1
    return [float(len(seen))] * len(responses)
"""


def test_a_name_in_a_key_is_not_taken_for_the_container_that_changes(tmp_path, monkeypatch):
    before = describe(tmp_path, monkeypatch, "mine:vowels", mine=(MINE, STORING))
    after = describe(tmp_path, monkeypatch, "mine:vowels", mine=(MINE, STORING.replace('".,"', '".,!"')))
    assert differences(before, after) == ["parts mine:vowels.MARKS was '.,', but is '.,!'"]
    assert {before["parts"][f"mine:vowels.{name}"] for name in ("COUNTS", "CACHE")} == {STATE}


HOLDING = """
import functools
from helpers import HALF, WORDS, share, words
class Kept: weights = WORDS
class Judge:
    half, calls = HALF, {}
    share = functools.partial(share, HALF)
    @functools.cached_property
    def table(self): return words()
    @classmethod
    def of(cls, text): return len(text) * cls.half
    def __call__(self, prompts, responses):
        self.calls[len(prompts)] = True
        return [sum(self.table.get(w, 0.0) for w in r.split()) + self.of(r) * len(Kept.weights) for r in responses]
judge = Judge()
"""
HELD = """
HALF, WORDS = 0.5, ['a']
size = 1.0
def words(): return {'good': size}
def share(part, text): return part * len(text)
"""


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (("0.5", "0.25"), "mine:Judge.half was 0.5, but is 0.25"),
        (("['a']", "['a', 'b']"), "mine:Kept.weights was list"),
        (("{'good'", "{'bad'"), "helpers:words was "),
        (("size = 1.0", "size = 2.0"), "helpers:words.size was 1.0, but is 2.0"),
        (("part * len", "part + len"), "helpers:share was "),
    ],
)
def test_what_a_class_holds_counts(tmp_path, monkeypatch, change, part):
    """Values of another module among its attributes, and the functions of its cached properties."""
    changes = {"name": "mine:judge", "mine": (MINE, HOLDING)}
    before = describe(tmp_path, monkeypatch, **changes, helpers=(HELPERS, HELD))
    found = differences(before, describe(tmp_path, monkeypatch, **changes, helpers=(HELPERS, HELD.replace(*change))))
    assert any(text.startswith(f"parts {part}") for text in found), found
    assert before["parts"]["mine:Judge.calls"] == STATE


def scaled(factor, table=()):
    def reward(prompts, responses):
        return [factor * len(r) + len(table) for r in responses]

    return reward


class Judge:
    def __init__(self, factor, calls=0):
        self.factor, self.calls, self.weights = factor, calls, torch.full((3,), float(factor))

    def __call__(self, prompts, responses):
        self.calls += 1
        return self.of(responses)

    def of(self, responses):
        return [self.factor * self.weights.sum().item() for _ in responses]


def together(one, other):
    return lambda prompts, responses: [a + b for a, b in zip(one(prompts, responses), other(prompts, responses))]


def cost():
    return RewardSource("trl_parm.rewards:brevity", negate=True).load()


@pytest.mark.parametrize(
    ("one", "same", "other"),
    [
        (scaled(1), scaled(1), scaled(2)),
        (scaled(1, [1]), scaled(1, [1]), scaled(1, [2])),
        (scaled(1, np.array(["a", "b"])), scaled(1, np.array(["a", "b"])), scaled(1, np.array(["a", "c"]))),
        (scaled(1, np.array([1, None])), scaled(1, np.array([1, None])), scaled(1, np.array([2, None]))),
        (scaled(np.float32(1)), scaled(np.float32(1)), scaled(np.float32(2))),
        (scaled(1, deque([Decimal(1)])), scaled(1, deque([Decimal(1)])), scaled(1, deque([Decimal(2)]))),
        (scaled(1, {"a", "b", "c"}), scaled(1, {"c", "b", "a"}), scaled(1, {"a", "b"})),
        (scaled(1, {"a": brevity}), scaled(1, {"a": brevity}), scaled(1, {"a": conciseness})),
        (Judge(1), Judge(1, calls=3), Judge(2)),
        (Judge(1).of, Judge(1).of, Judge(2).of),
        (partial(brevity, weight=1), partial(brevity, weight=1), partial(brevity, weight=2)),
        (functools.cache(brevity), brevity, functools.cache(conciseness)),
        (together(scaled(1), scaled(2)), together(scaled(1), scaled(2)), together(scaled(1), scaled(3))),
        (scaled(1, tiny_llama()), scaled(1, tiny_llama()), scaled(1, tiny_llama(1))),
        (cost(), cost(), brevity),
    ],
)  # fmt: skip
def test_values_that_code_holds_count(one, same, other):
    found = [describe_function(function)["parts"] for function in (one, same, other)]
    assert found[0] == found[1] != found[2]


def test_packages_count_by_their_version_and_what_has_no_source_is_named():
    assert {"vaderSentiment", "trl_parm.rewards:_vader"} < set(describe_function(positivity)["parts"])
    typed = eval("lambda prompts, responses: [0.0] * len(responses)")
    for function in (typed, len, scaled(1, [logging.getLogger()])):
        assert any(text.startswith("not hashed: ") for text in describe_function(function)["parts"].values())


def edited(monkeypatch, folder, factor):
    """A reward of a module that is written, and read, anew."""
    (folder / "edited.py").write_text(
        f"def reward(prompts, responses):\n    return [{factor} * len(r) for r in responses]\n"
    )
    monkeypatch.syspath_prepend(str(folder))
    sys.modules.pop("edited", None)
    return RewardSource("edited:reward").load()


@pytest.mark.parametrize("restart", [False, True])
def test_rows_of_an_edited_reward_are_refused_or_done_again(tmp_path, tokenizer, monkeypatch, restart):
    path, options = tmp_path / "results.jsonl", {"max_new_tokens": 3}
    table = lambda reward, **more: sweep(  # noqa: E731
        tiny_llama(), tokenizer, ["w1", "w2"], [Run("base")], {"a": reward}, path=path, **options, **more
    )
    pairs = Dataset.from_list([{"prompt": "w1", "chosen": "w2 w3", "rejected": "w4"}])
    before = table(edited(monkeypatch, tmp_path, 1.0))
    labels = relabel(pairs, {"a": edited(monkeypatch, tmp_path, 1.0)}, tmp_path / "pairs", test_size=0)
    reward = edited(monkeypatch, tmp_path, 2.0)
    kept = path.read_bytes()
    if not restart:
        for call in (lambda: table(reward), lambda: relabel(pairs, {"a": reward}, tmp_path / "pairs", test_size=0)):
            with pytest.raises(ValueError, match="rewards a parts edited:reward was .*`restart`"):
                call()
        assert path.read_bytes() == kept
        return
    after = table(reward, restart=True)
    assert after["a"] == [2 * score for score in before["a"]]
    assert after["response"] == before["response"]
    again = relabel(pairs, {"a": reward}, tmp_path / "pairs", test_size=0, restart=True)["train"]
    assert again["a_score_0"] == [2 * score for score in labels["train"]["a_score_0"]]
    kept = path.read_bytes()
    assert table(reward, restart=True).to_list() == after.to_list()  # rows of this reward stay
    assert path.read_bytes() == kept


def test_only_what_has_changed_is_done_again(tmp_path, tokenizer):
    """Rows of other methods, and scores of other objectives, stay."""
    done, found = [], []
    runs = [Run("one"), Run("two", model=lambda batch: done.append(batch) or tiny_llama())]
    options = {"path": tmp_path / "results.jsonl", "max_new_tokens": 2, "restart": True}
    for beta in (1, 1, 2):
        methods = {"methods": {"one": {"beta": 1}, "two": {"beta": beta}}}
        sweep(tiny_llama(), tokenizer, ["w1"], runs, {"a": brevity}, configuration=methods, **options)
        found.append(options["path"].read_text().splitlines())
    assert [len(lines) for lines in found] == [2, 2, 2]
    assert len({lines[0] for lines in found}) == 1
    assert len(done) == 2
    pairs, asked = Dataset.from_list([{"prompt": "w1", "chosen": "w2 w3", "rejected": "w4"}]), []

    def counted(prompts, responses):
        asked.extend(responses)
        return brevity(prompts, responses)

    for other in (conciseness, brevity):
        data = relabel(pairs, {"a": counted, "b": other}, tmp_path / "pairs", test_size=0, restart=True)["train"]
        assert data["b_score_0"] == other([""], ["w2 w3"])
    assert len(asked) == 2


def test_restart_removes_no_rows_of_anybody_else(tmp_path, tokenizer):
    path = tmp_path / "notes.jsonl"
    path.write_text('{"mine": 1}\n')
    for known in ('{"mine": 1}', '{"seed": 1}'):
        (tmp_path / "notes.config.json").write_text(known)
        with pytest.raises(ValueError, match="is no row of this version|another configuration"):
            sweep(tiny_llama(), tokenizer, ["w1"], [Run("base")], {"a": brevity}, path=path, restart=True)
        assert path.read_text() == '{"mine": 1}\n'


def bfloat16(model, tokenizer):
    model.to(torch.bfloat16)


def eager(model, tokenizer):
    model.set_attn_implementation("eager")


def end_token(model, tokenizer):
    model.generation_config.eos_token_id = [1, 7]


def penalty(model, tokenizer):
    model.generation_config.repetition_penalty = 1.5


def chat_template(model, tokenizer):
    tokenizer.chat_template += "w9 "


def weights(model, tokenizer):
    torch.nn.init.normal_(model.lm_head.weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (bfloat16, "model dtype was float32, but is bfloat16"),
        (eager, "model attention was sdpa, but is eager"),
        (end_token, r"end_tokens was 1, but is \[1, 7\]"),
        (penalty, "generation_config was None, but is {'repetition_penalty': 1.5}"),
        (chat_template, "chat_template was "),
        (weights, "model weights was "),
    ],
)
def test_rows_of_another_model_or_template_are_refused(tmp_path, change, message):
    """Each a change that nobody has written into a configuration."""
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    options = {"path": tmp_path / "results.jsonl", "max_new_tokens": 3}
    sweep(model, tokenizer, ["w1"], [Run("base")], {"a": brevity}, **options)
    change(model, tokenizer)
    with pytest.raises(ValueError, match=message):
        sweep(model, tokenizer, ["w1"], [Run("base")], {"a": brevity}, **options)


def test_adapters_on_a_base_model_do_not_make_it_another_one():
    model = tiny_llama()
    before = describe_model(model)
    arm = tiny_arm(model, target_modules=["q_proj"], modules_to_save=["lm_head"])
    assert describe_model(model) == describe_model(arm) == before
    assert hash_weights(arm) != hash_weights(tiny_arm(tiny_llama(), seed=2))


def test_loading_is_recorded(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    run = lambda **kwargs: evaluate(  # noqa: E731
        Models(str(tmp_path / "base"), **kwargs), ["base"], [], ["w1"], {"a": brevity}, tmp_path / "r.jsonl",
        max_new_tokens=2,
    )  # fmt: skip
    run()
    with pytest.raises(ValueError, match="loading attn_implementation was None, but is eager"):
        run(attn_implementation="eager")
    with pytest.raises(ValueError, match="loading dtype was auto, but is bfloat16"):
        run(dtype="bfloat16")


def test_a_record_of_an_older_version_is_not_gone_on_with(tmp_path, tokenizer):
    """It does not say what its rows were scored with. They can be read and plotted."""
    path, options = tmp_path / "results.jsonl", {"max_new_tokens": 3}
    sweep(tiny_llama(), tokenizer, ["w1"], [Run("base")], {"a": brevity}, path=path, **options)
    known = json.loads((tmp_path / "results.config.json").read_text())
    old = {key: value for key, value in known.items() if key not in ("rewards", "model", "end_tokens")}
    (tmp_path / "results.config.json").write_text(json.dumps(old))
    with pytest.raises(ValueError, match="end_tokens is not recorded, but is 1; .*rewards is not recorded"):
        sweep(tiny_llama(), tokenizer, ["w1"], [Run("base")], {"a": brevity}, path=path, **options)


def test_settings_of_a_methods_own_model_do_not_act(tokenizer):
    """Nor do its end tokens: the base's act on all."""
    own = tiny_llama()
    own.generation_config.repetition_penalty, own.generation_config.eos_token_id = 1.8, list(range(2, 60))
    own.generation_config.suppress_tokens = [11]
    runs = [
        Run("base"),
        Run("own", model=lambda batch: own),
        Run("mod", model=lambda batch: MOD(own, {"a": own}, [1.0])),
    ]
    base = tiny_llama()
    for value in (None, 1.4):
        base.generation_config.repetition_penalty = value
        table = sweep(base, tokenizer, ["w1 w2", "w3"], runs, {"a": brevity}, max_new_tokens=12)
        texts = table["response"]
        assert texts[:2] == texts[2:4] == texts[4:]
        assert table["tokens"][:2] == table["tokens"][2:4]


def test_tokens_are_counted_to_the_end_token_that_was_asked_for(tokenizer):
    model = tiny_llama()
    text = sweep(model, tokenizer, ["w1"], [Run("base")], {"a": brevity}, max_new_tokens=8)["response"][0]
    free = re.findall(r"w\d+|\.", text)
    end = tokenizer.convert_tokens_to_ids(free[0])
    row = sweep(model, tokenizer, ["w1"], [Run("base")], {"a": brevity}, max_new_tokens=8, eos_token_id=end)[0]
    assert (row["tokens"], row["response"]) == (1, free[0])


def test_code_of_rewards_that_a_method_searches_with_is_recorded(tmp_path):
    from trl_parm.evaluation.methods import Entry

    known = Entry.of({"method": "args", "rewards": {"a": "trl_parm.rewards:brevity"}}).configuration()
    assert "trl_parm.rewards:brevity" in known["rewards"]["a"]["parts"]


def test_loads_unchanged_models_as_before(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    assert hash_weights(AutoModelForCausalLM.from_pretrained(tmp_path)) == hash_weights(tiny_llama())
