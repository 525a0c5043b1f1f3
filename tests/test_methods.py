# SPDX-License-Identifier: Apache-2.0
"""Every row of the table of methods, from folders as training leaves them, against the processor made by hand.

A new method is one row of `TWINS`.
"""

import json
import shutil

import pytest
import torch
from conftest import response_ids, tiny_arm, tiny_llama, tiny_tokenizer
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaForSequenceClassification

from peft_pblora import MoSLoraConfig
from peft_pblora.card import add_results
from trl_parm import (
    BASE,
    LM,
    ARGSLogitsProcessor,
    CAGELogitsProcessor,
    ClassifierReward,
    GenARMLogitsProcessor,
    Guided,
    GuidedLogitsProcessor,
    MODLogitsProcessor,
    MODWeakToStrongLogitsProcessor,
    PARMLogitsProcessor,
    PreferenceText,
    Prompt,
    TransferQLogitsProcessor,
    Vocabulary,
    records,
    rewarded_soup,
)
from trl_parm.evaluation.decoding import Batch, encode_prompts
from trl_parm.evaluation.evaluate import Entry, evaluate
from trl_parm.evaluation.methods import METHODS
from trl_parm.evaluation.models import Models
from trl_parm.reward_models import RewardSource
from trl_parm.rewards import brevity, conciseness
from trl_parm.training.card import run_yaml
from trl_parm.training.config import PreferenceARMConfig


OBJECTIVES = ["helpful", "harmless"]
REWARDS = {"helpful": brevity, "harmless": conciseness}
PROMPTS = ["w1 w2", "w4 w5 w6"]
GRID = [[0.3, 0.7], [1.0, 0.0]]


def save_lora(backbone, folder, seed):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(backbone)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models in folders: two bases, reward models and policies, whole ones and adapters on the large or small one."""
    folder = tmp_path_factory.mktemp("models")
    for name, seed in (("large", 0), ("small", 1), ("one", 2), ("two", 3)):
        tiny_llama(seed).save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    tiny_llama(4, vocab_size=72).save_pretrained(folder / "padded")
    tiny_tokenizer().save_pretrained(folder / "padded")
    for name, backbone in (("arm", "large"), ("small_arm", "small"), ("padded_arm", "padded")):
        tiny_arm(AutoModelForCausalLM.from_pretrained(folder / backbone)).save_pretrained(folder / name)
    torch.manual_seed(5)
    config = MoSLoraConfig(
        objectives=OBJECTIVES, r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_weights=False
    )
    get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "large"), config).save_pretrained(folder / "moslora")
    for i, name in enumerate(("lora_one", "lora_two")):
        save_lora(folder / "large", folder / name, i)
        save_lora(folder / "small", folder / f"small_{name}", i + 5)
    PreferenceText(OBJECTIVES, "w9 {preference} w8 ").save(folder / "small_lora_one")
    config = tiny_llama(7).config
    config.num_labels = 2
    torch.manual_seed(7)
    LlamaForSequenceClassification(config).save_pretrained(folder / "judge")
    tiny_tokenizer().save_pretrained(folder / "judge")
    return folder


class Twin:
    """Models loaded anew for each call, so that nothing is shared."""

    def __init__(self, folder):
        self.folder = folder

    def model(self, name):
        return AutoModelForCausalLM.from_pretrained(self.folder / name)

    def adapted(self, backbone, name):
        return PeftModel.from_pretrained(self.model(backbone), self.folder / name).eval()

    def judge(self):
        return LlamaForSequenceClassification.from_pretrained(self.folder / "judge")

    def scorers(self, backbone, names):
        return {o: LM(self.adapted(backbone, n)) for o, n in zip(OBJECTIVES, names)}


def text_guide(twin, inputs, α):
    guide = encode_prompts(tiny_tokenizer(), PROMPTS, "w50 {prompt}")
    return PARMLogitsProcessor(twin.adapted("large", "arm"), α, 2.0, prompt=Prompt(inputs, guide=guide))


def preference_guide(twin, inputs, α):
    text, arm = PreferenceText(OBJECTIVES, "w9 {preference} w8 "), twin.adapted("small", "small_lora_one")
    return PARMLogitsProcessor(arm, beta=0.5, prompt=Prompt.with_preference(inputs, α, text, tiny_tokenizer()))


def soup_of_loras(twin, α):
    model = twin.adapted("large", "lora_one")
    model.load_adapter(twin.folder / "lora_two", adapter_name="two")
    return rewarded_soup(dict(zip(OBJECTIVES, ["default", "two"])), α, model)


def cached_judges(twin):
    return {"helpful": ClassifierReward(twin.judge(), 0), "harmless": ClassifierReward(twin.judge(), 1)}


LORAS = {"helpful": "lora_one", "harmless": "lora_two"}
SMALL_LORAS = {"helpful": "small_lora_one", "harmless": "small_lora_two"}
TEXTS = {"helpful": "trl_parm.rewards:brevity", "harmless": "trl_parm.rewards:conciseness"}
JUDGES = {"helpful": {"source": "judge", "label": 0}, "harmless": {"source": "judge", "label": 1}}
TWINS = {
    "base": ({}, lambda t, inputs, α: None),
    "untrained_arm": (
        {"arm": "arm", "beta": 2.0},
        lambda t, inputs, α: GuidedLogitsProcessor(BASE + 0.5 * LM(t.model("large"))),
    ),
    "parm": ({"arm": "arm"}, lambda t, inputs, α: PARMLogitsProcessor(t.adapted("large", "arm"), α)),
    "parm, weak to strong": (
        {"arm": "small_arm", "beta": 0.5},
        lambda t, inputs, α: PARMLogitsProcessor(t.adapted("small", "small_arm"), α, 0.5),
    ),
    "parm, another vocabulary": (
        {"arm": "padded_arm"},
        lambda t, inputs, α: PARMLogitsProcessor(
            t.adapted("padded", "padded_arm"), α, vocabulary=Vocabulary(tiny_tokenizer(), tiny_tokenizer())
        ),
    ),
    "parm, another template": ({"arm": "arm", "beta": 2.0, "template": "w50 {prompt}"}, text_guide),
    "parm_prompt": ({"arm": "small_lora_one", "beta": 0.5}, preference_guide),
    "parm_shuffled": (
        {"arm": "arm", "beta": 0.5},
        lambda t, inputs, α: PARMLogitsProcessor(t.adapted("large", "arm"), list(α)[::-1], 0.5),
    ),
    "arm_alone": (
        {"arm": "arm"}, lambda t, inputs, α: GuidedLogitsProcessor(LM(t.adapted("large", "arm"), α)),
    ),
    "uniarm": ({"arm": "moslora"}, lambda t, inputs, α: PARMLogitsProcessor(t.adapted("large", "moslora"), α)),
    "svd_lora": ({"arm": "arm"}, lambda t, inputs, α: PARMLogitsProcessor(t.adapted("large", "arm"), α)),
    "genarm": (
        {"arms": {"harmless": "lora_two", "helpful": "lora_one"}, "beta": 0.5},
        lambda t, inputs, α: GenARMLogitsProcessor(t.scorers("large", LORAS.values()), α, 0.5),
    ),
    "genarm, weak to strong": (
        {"arms": SMALL_LORAS},
        lambda t, inputs, α: GenARMLogitsProcessor(t.scorers("small", SMALL_LORAS.values()), α),
    ),
    "mod": ({"policies": LORAS}, lambda t, inputs, α: MODLogitsProcessor(t.scorers("large", LORAS.values()), α)),
    "mod, whole models": (
        {"policies": {"helpful": "one", "harmless": "two"}, "divergence": "forward_kl"},
        lambda t, inputs, α: MODLogitsProcessor({o: t.model(n) for o, n in zip(OBJECTIVES, ("one", "two"))}, α,
                                                "forward_kl"),
    ),
    "mod_w2s": (
        {"policies": SMALL_LORAS, "reference": "small"},
        lambda t, inputs, α: MODWeakToStrongLogitsProcessor(
            t.scorers("small", SMALL_LORAS.values()), t.model("small"), α
        ),
    ),
    "mod_w2s, another reference": (
        {"policies": SMALL_LORAS, "reference": "two"},
        lambda t, inputs, α: MODWeakToStrongLogitsProcessor(
            t.scorers("small", SMALL_LORAS.values()), t.model("two"), α
        ),
    ),
    "cage": (
        {"arm": "arm", "tau": 0.5, "k": 5},
        lambda t, inputs, α: CAGELogitsProcessor(t.adapted("large", "arm"), α, 0.5, 5),
    ),
    "cage, an ARM for each": (
        {"arms": SMALL_LORAS, "tau": 0.5, "k": 5, "rounds": 3},
        lambda t, inputs, α: CAGELogitsProcessor(t.scorers("small", SMALL_LORAS.values()), α, 0.5, 5, 3),
    ),
    "worst_case": (
        {"arm": "arm", "beta": 0.5},
        lambda t, inputs, α: PARMLogitsProcessor(t.adapted("large", "arm"), "worst_case", 0.5),
    ),
    "worst_case, an ARM for each": (
        {"arms": SMALL_LORAS},
        lambda t, inputs, α: GenARMLogitsProcessor(t.scorers("small", SMALL_LORAS.values()), "worst_case"),
    ),
    "args": (
        {"rewards": TEXTS, "k": 3},
        lambda t, inputs, α: ARGSLogitsProcessor(REWARDS, α, k=3, tokenizer=tiny_tokenizer(), prompts=PROMPTS),
    ),
    "args, cached": (
        {"rewards": JUDGES, "k": 3, "weight": 2.0, "cached": True},
        lambda t, inputs, α: ARGSLogitsProcessor(cached_judges(t), α, 2.0, 3),
    ),
    "transfer_q": (
        {"rewards": TEXTS, "k": 3, "rollout_tokens": 2, "policy": "lora_one"},
        lambda t, inputs, α: TransferQLogitsProcessor(
            REWARDS, t.adapted("large", "lora_one"), α, k=3, rollout_tokens=2, tokenizer=tiny_tokenizer(),
            prompts=PROMPTS
        ),
    ),
    "rewarded_soups": ({"policies": LORAS}, None),
    "rewarded_soups, whole models": ({"policies": {"helpful": "one", "harmless": "two"}}, None),
}  # fmt: skip


def in_folder(folder, value):
    """Settings whose names of folders are paths."""
    if isinstance(value, dict):
        return {key: in_folder(folder, entry) for key, entry in value.items()}
    return str(folder / value) if isinstance(value, str) and (folder / value).is_dir() else value


def run(folder, methods, path, **options):
    models = Models(str(folder / "large"))
    options = {"batch_size": 3, "max_new_tokens": 4, **options}
    return evaluate(models, [in_folder(folder, m) for m in methods], GRID, PROMPTS, REWARDS, path, **options)


def by_hand(folder, make, α, method) -> list[str]:
    twin, tokenizer = Twin(folder), tiny_tokenizer()
    model = twin.model("large")
    if method == "rewarded_soups":
        model = soup_of_loras(twin, α)
    elif make is None:
        model = rewarded_soup({o: twin.model(n) for o, n in zip(OBJECTIVES, ("one", "two"))}, α)
    inputs = encode_prompts(tokenizer, PROMPTS)
    guide = make(twin, inputs, α) if make else None
    output = model.generate(
        **inputs, logits_processor=[guide] if guide else [], max_new_tokens=4, do_sample=False, pad_token_id=0
    )
    return tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("name", list(TWINS))
def test_every_method_decodes_as_its_processor_does(folder, tmp_path, name):
    settings, make = TWINS[name]
    method = name.split(",")[0]
    table = run(folder, [{"method": method, **settings}], tmp_path / "results.jsonl")
    grid = [None] if METHODS[method].control else GRID
    assert len(table) == len(grid) * 2
    for i, α in enumerate(grid):
        assert table["response"][2 * i : 2 * i + 2] == by_hand(folder, make, α, name), α
    assert set(table["method"]) == {METHODS[method].title}
    assert len(set(table["response"])) > 1
    base = Twin(folder).model("large")
    for row in table:  # whatever adapters the method has on the base model
        prompt = encode_prompts(tiny_tokenizer(), [row["prompt"]])["input_ids"][0]
        response = torch.tensor(response_ids(row))
        if (response < 3).any():  # which the text does not show
            continue
        scores = base(input_ids=torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        assert row["log_prob_base"] == pytest.approx(scores.gather(-1, response[:, None]).sum().item(), abs=1e-3)


def test_weights_that_are_all_0_leave_what_the_formulas_say(folder, tmp_path):
    """The base model where it is a term, or below LoRAs, beside other preferences; of a product of policies alone, and
    of an average of whole models, nothing."""
    of_base = {name: TWINS[name] for name in ("genarm", "mod_w2s", "rewarded_soups")}
    of_none = {name: TWINS[name] for name in ("mod", "rewarded_soups, whole models")}
    methods = [
        {"method": name.split(",")[0], "name": name, **settings} for name, (settings, _) in (of_base | of_none).items()
    ]
    models, grid = Models(str(folder / "large")), [[0.0, 0.0], [1.5, -0.5], [0.0, 0.0001]]
    table = evaluate(
        models, [in_folder(folder, method) for method in ("base", *methods)], grid, PROMPTS, REWARDS,
        tmp_path / "results.jsonl", batch_size=4, max_new_tokens=4, allow_off_simplex=True,
    )  # fmt: skip
    texts = {
        name: [row["response"] for row in table if row["method"] == name and row["preference"] in (None, [0.0, 0.0])]
        for name in table["method"]
    }
    first = tiny_tokenizer().decode([0] * 4, skip_special_tokens=True)  # of tokens that are all alike
    assert texts == {
        "Base": texts["Base"],
        **dict.fromkeys(of_base, texts["Base"]),
        **dict.fromkeys(of_none, [first] * 2),
    }


def test_every_row_of_the_table_has_a_twin():
    assert {name.split(",")[0] for name in TWINS} == set(METHODS)


def test_methods_share_nothing_but_the_base(folder, tmp_path):
    """One after the other, in any order, they do as each alone; adapters on the base leave nothing behind."""
    names = ["parm", "genarm", "base", "rewarded_soups", "transfer_q"]
    methods = [{"method": name, **TWINS[name][0]} for name in names]
    together = run(folder, methods, tmp_path / "together.jsonl", do_sample=True)
    turned = run(folder, methods[::-1], tmp_path / "turned.jsonl", do_sample=True)
    key = lambda row: (row["method"], row["label"], row["prompt"])  # noqa: E731
    assert {key(r): r["response"] for r in together} == {key(r): r["response"] for r in turned}
    extra = {row["method"]: row["extra_parameters"] for row in together}
    counts = {
        name: sum(p.numel() for n, p in Twin(folder).adapted("large", name).named_parameters() if marker in n)
        for name, marker in (("arm", "pblora_"), ("lora_one", "lora_"))
    }
    assert extra["Base"] == 0
    assert extra["PARM"] == counts["arm"]
    assert extra["GenARM"] == extra["Rewarded Soups"] == 2 * counts["lora_one"]
    backbone = sum(p.numel() for p in Twin(folder).model("large").parameters())
    assert extra["Transfer-Q"] == backbone + counts["lora_one"]
    assert {row["extra_bytes"] for row in together if row["method"] == "PARM"} == {4 * counts["arm"]}


def test_adapters_have_names_of_their_own(tmp_path):
    """Of folders that differ in a dot alone, or are called as a method of a mapping is."""
    tiny_llama().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    folders = [str(tmp_path / name) for name in ("v1.0", "v1_0", "update")]
    for seed, folder in enumerate(folders):
        save_lora(tmp_path / "base", folder, seed)
    models = Models(str(tmp_path / "base"))
    ids = torch.arange(2, 10)[None]
    guides = [models.guide(folder) for folder in folders]
    found = [Guided(models.base, guide.lm())(ids).logits.log_softmax(-1) for guide in guides]
    for folder, logits in zip(folders, found, strict=True):
        twin = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), folder).eval()
        torch.testing.assert_close(logits, twin(ids).logits.log_softmax(-1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "name",
    [
        "parm",
        "mod_w2s",
        "transfer_q",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("arm_alone", "genarm", "args")),
    ],
)
def test_preferences_in_one_batch_write_what_each_writes_alone(folder, tmp_path, monkeypatch, name):
    """Prompts of several lengths with a long common start, end tokens at other steps, and a run that was killed: with
    one text in a batch, and with all that fit."""
    settings = {"method": name.split(",")[0], **TWINS[name][0]}
    prompts = ["w1 w2", "w4", "w5 w6 w7 w8", "w9 w2 w3"]
    start = " ".join(f"w{i}" for i in range(20, 32))
    grid = [[0.3, 0.7], [1.0, 0.0], [0.8, 0.2]]

    def texts(path, **options):
        options = {
            "max_new_tokens": 7,
            "template": f"{start} {{prompt}}",
            "eos_token_id": [1, 5, 9, 13, 17],
            **options,
        }
        table = evaluate(
            Models(str(folder / "large")), [in_folder(folder, settings)], grid, prompts, REWARDS, path, **options
        )
        keys = ("label", "prompt", "response", "tokens", "helpful", "harmless", "seed")
        return [tuple(row[key] for key in keys) for row in table]

    for options in ({}, {"do_sample": True, "top_k": 20}):
        alone = texts(None, batch_size=1, **options)
        ends = [tokens for _, _, _, tokens, *_ in alone]
        assert min(ends) < max(ends)
        path = tmp_path / f"{len(options)}.jsonl"
        rows = fed_rows_of_base(monkeypatch)
        assert texts(path, batch_size=8, **options) == alone
        assert any(count > len(prompts) for count in rows)
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(lines[1:9] + lines[11:13]))
        assert texts(path, batch_size=20, **options) == alone


def fed_rows_of_base(monkeypatch) -> list[int]:
    """How many texts every call of a guided model's `generate` gets, from now on."""
    rows, generate = [], Guided.generate

    def counting(self, *given, **settings):
        rows.append(len(settings["input_ids"]))
        return generate(self, *given, **settings)

    monkeypatch.setattr(Guided, "generate", counting)
    return rows


def test_progress_counts_each_run_as_often_as_it_has_batches(folder, tmp_path):
    parm, seen = {"method": "parm", **TWINS["parm"][0]}, []
    run(folder, [parm, "base"], None, batch_size=1, on_batch=seen.append)
    assert [(run.method, run.preference) for run in seen].count(("Base", None)) == len(PROMPTS)
    assert len(seen) == len(PROMPTS) * (len(GRID) + 1)
    seen.clear()
    run(folder, [parm], None, batch_size=100, on_batch=seen.append)
    assert [run.preference for run in seen] == GRID


def test_finished_methods_are_not_loaded_again(folder, tmp_path, monkeypatch):
    path = tmp_path / "results.jsonl"
    parm = {"method": "parm", **TWINS["parm"][0]}
    first = run(folder, ["base", parm], path)
    loaded = []
    monkeypatch.setattr(Models, "_load", lambda self, name: loaded.append(name))
    batches, started = [], []
    again = run(folder, ["base", parm], path, on_batch=batches.append, on_start=started.append)
    assert not loaded
    assert (len(batches), started) == (3, ["Base", "PARM"])
    assert again.to_list() == first.to_list()


def test_another_arm_of_the_same_name_is_refused(folder, tmp_path):
    path, parm = tmp_path / "results.jsonl", {"method": "parm", "arm": "arm"}
    run(folder, [parm], path)
    known = json.loads((tmp_path / "results.config.json").read_text())
    assert known["methods"]["PARM"]["arm"]["fingerprint"] != known["base"]["fingerprint"]
    with pytest.raises(ValueError, match="methods PARM arm fingerprint was"):
        run(folder, [{**parm, "arm": "small_arm"}], path)
    weights = folder / "arm/adapter_model.safetensors"
    saved = weights.read_bytes()
    tiny_arm(AutoModelForCausalLM.from_pretrained(folder / "large"), seed=9).save_pretrained(folder / "arm")
    try:
        with pytest.raises(ValueError, match="methods PARM arm fingerprint was"):
            run(folder, [parm], path)
    finally:
        weights.write_bytes(saved)
    run(folder, [{**parm, "name": "PARM, β 2", "beta": 2.0}], path)


def test_no_record_has_an_access_token(folder, tmp_path):
    """Nor do the arguments beside a run, nor the card of a model, which is uploaded."""
    path, rewards = tmp_path / "results.jsonl", {"helpful": RewardSource("trl_parm.rewards:brevity")}
    for token in ("hf_one", "hf_two"):
        rewards["helpful"].model_kwargs["token"] = token
        models = Models(str(folder / "large"), token=token)
        evaluate(models, ["base"], [], PROMPTS, rewards, path, max_new_tokens=1)
    records.write_run(tmp_path / "run.yaml", "evaluate", {"model_kwargs": {"token": "hf_two", "device_map": "cpu"}})
    settings = {"model_init_kwargs": {"token": "hf_two"}, "hub_token": "hf_two", "use_cpu": True, "bf16": False}
    written = run_yaml(PreferenceARMConfig("out", report_to="none", **settings))
    texts = [(tmp_path / name).read_text() for name in ("results.config.json", "run.yaml")]
    assert "device_map: cpu" in texts[1]
    assert not any("hf_" in text for text in (*texts, written))


def test_an_arm_whose_model_is_not_there_is_named(folder, tmp_path, monkeypatch):
    """As where its folder was given by a path from another place."""
    arm = tmp_path / "arm"
    shutil.copytree(folder / "small_arm", arm)
    config = json.loads((arm / "adapter_config.json").read_text())
    (arm / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "elsewhere/small"}))
    with pytest.raises(ValueError, match="arm' was trained on 'elsewhere/small', as `base_model_name_or_path`"):
        run(folder, [{"method": "parm", "arm": str(arm)}], tmp_path / "results.jsonl")


def test_another_backbone_of_an_arm_is_refused(folder, tmp_path):
    """The adapter's own files stay as they are."""
    path, methods = tmp_path / "results.jsonl", [{"method": "genarm", "arms": dict.fromkeys(OBJECTIVES, "small_arm")}]
    run(folder, methods, path)
    weights = folder / "small/model.safetensors"
    saved = weights.read_bytes()
    tiny_llama(9).save_pretrained(folder / "small")
    try:
        with pytest.raises(ValueError, match="methods GenARM arms helpful backbone fingerprint was"):
            run(folder, methods, path)
    finally:
        weights.write_bytes(saved)
    run(folder, methods, path)


def test_a_fingerprint_sees_the_middle_of_a_large_file_and_plain_vocabularies(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "WHOLE", 2**21)
    weights, vocabulary = tmp_path / "model.safetensors", tmp_path / "vocab.txt"
    content = bytearray(2**23)
    weights.write_bytes(content)
    vocabulary.write_text("a")
    found = {records.fingerprint(str(tmp_path))}
    content[2**22 - 2**14 : 2**22] = b"x" * 2**14  # a tensor of a few thousand weights
    weights.write_bytes(content)
    found.add(records.fingerprint(str(tmp_path)))
    vocabulary.write_text("b")
    found.add(records.fingerprint(str(tmp_path)))
    assert len(found) == 3


def test_a_card_and_the_order_of_modules_do_not_make_another_adapter(folder, tmp_path):
    """`plot --card` adds measures to the card of an adapter whose evaluation goes on."""
    shutil.copytree(folder / "small_arm", tmp_path / "arm")
    known, file = records.fingerprint(str(tmp_path / "arm")), tmp_path / "arm" / "adapter_config.json"
    assert known is not None
    add_results(tmp_path / "arm", [["measure", "value"], ["hypervolume", 1.0]])
    config = json.loads(file.read_text())
    assert config["card"]["measures"]
    assert records.fingerprint(str(tmp_path / "arm")) == known
    file.write_text(json.dumps({**config, "target_modules": config["target_modules"][::-1]}))
    assert records.fingerprint(str(tmp_path / "arm")) == known
    file.write_text(json.dumps({**config, "lora_alpha": 99}))
    assert records.fingerprint(str(tmp_path / "arm")) != known
    file.write_text("[")
    assert records.fingerprint(str(tmp_path / "arm")) is not None


def test_the_bases_generation_config_acts_on_every_method_and_is_recorded(folder, tmp_path):
    """Methods that are the base model by another name, one of them with a penalty of its own."""
    for name, penalty in (("penal", 1.7), ("other", 1.2)):
        model = AutoModelForCausalLM.from_pretrained(folder / "large")
        model.generation_config.repetition_penalty = penalty
        model.generation_config.do_sample = True
        model.generation_config.temperature = 0.3  # of sampling, which is not the model's
        model.save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
    copies = {"helpful": str(tmp_path / "other"), "harmless": str(tmp_path / "penal")}
    methods = [
        "base", {"method": "mod", "policies": copies}, {"method": "rewarded_soups", "policies": copies},
        {"method": "mod_w2s", "policies": copies, "reference": copies["helpful"]},
        {"method": "args", "rewards": TEXTS, "k": 3, "weight": 1e-9},
    ]  # fmt: skip
    options = {"batch_size": 2, "max_new_tokens": 8, "path": tmp_path / "results.jsonl"}
    table = evaluate(Models(str(tmp_path / "penal")), methods, GRID[:1], PROMPTS, REWARDS, **options)
    texts = [table["response"][i : i + 2] for i in range(0, len(table), 2)]
    assert texts == [texts[0]] * 5
    assert texts[0] != evaluate(Models(str(folder / "large")), ["base"], [], PROMPTS, REWARDS, None,
                                max_new_tokens=8)["response"]  # fmt: skip
    recorded = json.loads((tmp_path / "results.config.json").read_text())["generation_config"]
    assert recorded == {"repetition_penalty": 1.7}
    with pytest.raises(ValueError, match="generation_config was {'repetition_penalty': 1.7}, but is None"):
        evaluate(Models(str(folder / "large")), ["base"], [], PROMPTS, REWARDS, **options)


def test_guides_of_one_method_share_their_prompt(folder, tmp_path):
    """Where their tokenizers would make different tokens of it, they are refused."""
    for name in ("one", "two"):
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = {"one": "w1 ", "two": "w2 "}[name] + "{{ messages[0]['content'] }}"
        AutoModelForCausalLM.from_pretrained(folder / name).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    method = {"method": "genarm", "arms": {"helpful": str(tmp_path / "one"), "harmless": str(tmp_path / "two")}}
    assert len(run(folder, [{**method, "template": "w9 {prompt}"}], None)) == 4
    with pytest.raises(ValueError, match="their tokenizers make different tokens of it"):
        run(folder, [{**method, "template": "chat"}], None)


@pytest.mark.parametrize("name", ["parm", "parm_prompt"])
def test_the_end_of_a_guides_own_prompt_is_kept_too(folder, name):
    method = {
        "parm": {"method": "parm", "arm": "arm"},
        "parm_prompt": {"method": "parm_prompt", "arm": "small_lora_one"},
    }
    method = {**method[name], "template": "w50 {prompt}"}
    models = Models(str(folder / "large"))
    model_at = Entry.of(in_folder(folder, method)).make(models)
    inputs = encode_prompts(models.tokenizer, PROMPTS, max_length=2)
    batch = Batch(None, PROMPTS, inputs, {"helpful": 0.5, "harmless": 0.5}, max_prompt_length=2)
    ids = model_at(batch)[1]["guide_input_ids"]
    assert ids[:, -2:].tolist() == tiny_tokenizer()(["w1 w2", "w5 w6"])["input_ids"]
    assert (ids.shape[1] == 2) == (name == "parm")


@pytest.mark.parametrize("template", [None, "w50 " * 9 + "{prompt}"])
def test_a_prompt_that_a_guide_has_no_positions_for_is_refused(folder, tmp_path, template):
    tiny_llama(1, max_position_embeddings=8 if template else 4).save_pretrained(tmp_path / "short")
    tiny_tokenizer().save_pretrained(tmp_path / "short")
    method = {"method": "genarm", "arms": dict.fromkeys(OBJECTIVES, str(tmp_path / "short")), "template": template}
    with pytest.raises(ValueError, match="tokens as a guide reads it, which has . positions"):
        run(folder, [method], None)


def reordered(model, tokenizer, folder):
    """The same model and tokenizer, but for the ids of words, which are in the opposite order."""
    order = [*range(6), *range(63, 5, -1)]
    for weight in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
        weight.data = weight.data[order]
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    core["model"]["vocab"] = {word: order[i] for word, i in core["model"]["vocab"].items()}
    tokenizer._tokenizer = type(tokenizer.backend_tokenizer).from_str(json.dumps(core))
    for one in (model, tokenizer):
        one.save_pretrained(folder)
    return str(folder)


def test_ids_of_another_tokenizer_are_aligned_or_refused_where_the_vocabularies_have_one_size(folder, tmp_path):
    other = reordered(tiny_llama(2, tie_word_embeddings=True), tiny_tokenizer(), tmp_path / "other")
    tiny_llama(2, tie_word_embeddings=True).save_pretrained(tmp_path / "same")
    tiny_tokenizer().save_pretrained(tmp_path / "same")
    assert json.loads((tmp_path / "other/tokenizer.json").read_text())["model"]["vocab"]["w57"] == 6
    found = [
        [row["response"] for row in run(folder, [{"method": "genarm", "arms": dict.fromkeys(OBJECTIVES, name)}], None)]
        for name in (str(tmp_path / "same"), other)
    ]
    assert found[0] == found[1]
    models = Models(str(folder / "large"))
    assert models.guide(other).vocabulary is models.guide(other).vocabulary  # guides share a forward
    assert models.guide(str(tmp_path / "same")).vocabulary is None
    renamed = tiny_tokenizer()
    renamed.add_tokens("<reserved>")
    sized = tiny_llama(2, vocab_size=65)
    sized.save_pretrained(tmp_path / "base")
    named = tiny_tokenizer()
    named.add_tokens("<call>")
    named.save_pretrained(tmp_path / "base")
    for part in (sized, renamed):
        part.save_pretrained(tmp_path / "renamed")
    models_of_65 = Models(str(tmp_path / "base"))
    assert models_of_65.guide(str(tmp_path / "renamed")).vocabulary is None
    models_of_65.check_tokens(str(tmp_path / "renamed"), sized)
    policies = dict.fromkeys(OBJECTIVES, other)
    for method in (
        {"method": "transfer_q", "rewards": TEXTS, "policy": other, "rollout_tokens": 2},
        {"method": "rewarded_soups", "policies": policies},
    ):
        with pytest.raises(ValueError, match="58 of them are others there or unknown, such as 'w0'"):
            run(folder, [method], None)


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        (["palm"], "A method is 'palm', but it must be one of base, untrained_arm, parm"),
        (["parm"], "'PARM' has no arm. Its settings are arm, beta, template"),
        ([{"method": "parm", "arm": "arm", "bta": 1}], "'PARM' has bta"),
        ([{"method": "base", "beta": 1}], "Its settings are nothing"),
        (["base", {"method": "parm", "name": "Base", "arm": "arm"}], "Two methods have the same name"),
        ([{"method": "parm", "arm": "arm", "beta": 0}], "must be a positive, finite number"),
        ([{"method": "mod", "policies": LORAS, "order": 7.0}], "`divergence` is 'reverse_kl', which has none"),
        ([{"method": "genarm", "arms": {"helpful": "lora_one"}}], "has models for helpful, but the objectives are"),
        (
            [{"method": "rewarded_soups", "policies": {"helpful": "lora_one", "harmless": "small_lora_one"}}],
            "need one backbone",
        ),
        ([{"method": "args", "rewards": TEXTS, "cached": True}], "`cached` is for classifiers"),
        (
            [
                {
                    "method": "args",
                    "rewards": {**JUDGES, "helpful": {"source": "judge", "negate": True}},
                    "cached": True,
                }
            ],
            "is a cost, minus its output",
        ),
    ],
)
def test_bad_methods(folder, tmp_path, methods, message):
    with pytest.raises(ValueError, match=message):
        run(folder, methods, tmp_path / "results.jsonl")


OF_OTHERS = "has models for helpful, harmless, but the objectives are helpful, funny"


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"method": "parm", "arm": "no_such_arm"}, "There is no model to read at 'no_such_arm'"),
        ({"method": "parm", "arm": "lora_one"}, "needs an ARM with a preference, but .* of the kind"),
        ({"method": "parm", "arm": "small_arm"}, OF_OTHERS),
        ({"method": "cage", "arm": "small_arm"}, OF_OTHERS),
        ({"method": "genarm", "arms": LORAS}, OF_OTHERS),
        (
            {"method": "mod", "policies": LORAS, "divergence": "alpha", "order": 0.0},
            "`order` is 0.0, but it must be a positive",
        ),
        ({"method": "worst_case"}, "`worst_case` needs either `arm`, a preference-aware one, or `arms`"),
        ({"method": "mod_w2s", "policies": {"helpful": "one", "funny": "two"}, "reference": "no_such"}, "no_such"),
        ({"method": "args", "rewards": {**TEXTS, "helpful": "no_such_judge"}}, "no reward model to read at 'no_such_"),
    ],
)
def test_a_mistake_is_told_before_other_methods_are_decoded(folder, tmp_path, method, message):
    rewards, path = {"helpful": brevity, "funny": conciseness}, tmp_path / "results.jsonl"
    with pytest.raises(ValueError, match=message):
        evaluate(Models(str(folder / "large")), ["base", in_folder(folder, method)], GRID, PROMPTS, rewards, path)
    assert not path.exists()


def test_controls_have_no_preference():
    assert [r.preference for r in Entry.of("base").runs(GRID)] == [None]
    assert [r.preference for r in Entry.of({"method": "parm", "arm": "x"}).runs(GRID)] == GRID
