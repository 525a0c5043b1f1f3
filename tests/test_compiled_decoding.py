# SPDX-License-Identifier: Apache-2.0
"""Guidance with static caches and compiled forwards: the answers of the default path, and one compilation for all α.

The compilers here run what was traced as it is, so that what is traced, and how often, is seen in seconds.
"""

import copy
import shutil

import pytest
import torch
from conftest import tiny_arm, tiny_llama
from peft import PeftModel, get_peft_model
from test_decoders import BETAS, MASK, MODES, PROMPTS, ROWS
from test_guides import lora_model
from test_shared_forward import FORMULAS, base_forwards, generate
from transformers import CompileConfig, StaticCache

from peft_pblora import MoSLoraConfig, PBLoraConfig, fold, save_as_lora, set_preference
from trl_parm import BASE, LM, GenARMLogitsProcessor, GuidedLogitsProcessor, PARMLogitsProcessor, Scorer


class Compiler:
    """Keeps the graphs that it was given to compile.

    Attributes:
        settings (`dict`): Arguments for `generate`, always the same: others would compile anew.
    """

    def __init__(self, backend=None, **settings) -> None:
        torch._dynamo.reset()
        self.graphs: list[torch.fx.GraphModule] = []
        self._outputs: list[torch.Tensor] = []
        # Functions, since `CompileConfig` copies everything else.
        config = CompileConfig(backend=backend or (lambda graph, inputs, **mode: self.plain(graph)), **settings)
        config._compile_all_devices = True
        self.settings = {"cache_implementation": "static", "compile_config": config}
        self.own_cache = {"compile_config": config}

    def plain(self, graph):
        self.graphs.append(graph)
        return graph.forward

    def overwriting(self, graph, inputs, **mode):
        """As CUDA graphs: every run writes to memory in which earlier runs of any graph have left their outputs."""

        def run(*args):
            for output in self._outputs:
                output.fill_(torch.nan)
            results = graph.forward(*args)
            self._outputs += [t for t in results if t.is_floating_point()]
            return results

        return run


@pytest.fixture
def folds(monkeypatch) -> list:
    """Every fold of an adapter, from now on."""
    made, make = [], fold.Fold.__init__
    monkeypatch.setattr(fold.Fold, "__init__", lambda self, *args: (made.append(self), make(self, *args))[1])
    return made


@pytest.fixture
def own_forwards(monkeypatch) -> list:
    """Every forward of a guide by itself, from now on."""
    made, forward = [], LM._forward
    monkeypatch.setattr(LM, "_forward", lambda self, *args: (made.append(self), forward(self, *args))[1])
    return made


def assert_same(joint, separate):
    assert torch.equal(joint.sequences, separate.sequences)
    for ours, theirs in zip(joint.scores, separate.scores, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


COMPILED = [
    ("PARM, GPT-2", 1),
    ("two preferences, one for each row, and none", 1),
    pytest.param("PARM, sliding window", 2, marks=pytest.mark.slow),
    pytest.param("MoSLoRA", 1, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "graphs"), COMPILED)
def test_a_compiled_forward_of_base_and_guides_answers_as_two(name, graphs, own_forwards):
    """The masks of a sliding window change their size once it is full: the model alone needs two graphs there too."""
    make, formula = FORMULAS[name]
    compiler, model = Compiler(), make()
    joint = generate(model, formula(model), **compiler.settings)
    assert not own_forwards
    assert len(compiler.graphs) == graphs
    assert_same(joint, generate(model, formula(model, shared_forward=False)))


STATIC = ["greedy", "one prompt", "sampling", "several sequences", "beam search", "beam sampling", "chunked prefill"]


@pytest.mark.parametrize("mode", STATIC)
def test_a_static_cache_answers_as_the_default_one(mode, own_forwards):
    static = {"cache_implementation": "static", "disable_compile": True}
    preference = ROWS[1] if MODES[mode].get("prompts") == 1 else ROWS
    model = tiny_arm(tiny_llama(0))
    joint = generate(model, PARMLogitsProcessor(model, preference), **MODES[mode], **static)
    assert not own_forwards
    assert_same(joint, generate(model, PARMLogitsProcessor(model, preference, shared_forward=False), **MODES[mode]))


def small_llama(seed: int = 0):
    return tiny_llama(seed, num_hidden_layers=1)


def text(base, guide, ids=PROMPTS, **settings):
    return base.generate(
        ids, attention_mask=MASK[: len(ids)], max_new_tokens=8, eos_token_id=-1, logits_processor=[guide], **settings
    )


@pytest.mark.parametrize(
    ("shared", "rows"), [(True, False), (True, True), (False, True)], ids=["one α", "α and β a row", "separate guide"]
)
def test_preference_beta_and_text_change_without_compiling_again(shared, rows, folds):
    """And each adapted layer is folded once for each α, however many tokens follow: W(α) is not in the graph."""
    preferences = [ROWS, ROWS.flip(0), ROWS.flip(1)] if rows else [[0.3, 0.7], [1.0, 0.0], [0.5, 0.5]]
    betas = [BETAS, BETAS + 1, BETAS + 2] if rows else [0.5, 1.0, 2.0]
    arm, twin = tiny_arm(small_llama(0)), tiny_arm(small_llama(0))
    base = arm.get_base_model() if shared else small_llama(0)
    compiler, guide, texts = Compiler(fullgraph=True), PARMLogitsProcessor(arm, preferences[0]), []
    for i, (preference, beta) in enumerate(zip(preferences, betas)):
        with torch.compiler.set_stance("fail_on_recompile" if i else "default"):
            guide.set(preference, beta)
            folds.clear()
            texts.append(text(base, guide, PROMPTS + 3 * i, **compiler.settings))
            assert len(folds) == 3
            text(base, guide, PROMPTS + i, **compiler.settings)
            assert len(folds) == 3
    (graph,) = compiler.graphs
    inputs = [node.name for node in graph.graph.nodes if node.op == "placeholder"]
    assert any("fold" in name for name in inputs) == shared
    assert not any("_core_" in name or "preference" in name for name in inputs)
    for i, (preference, beta) in enumerate(zip(preferences, betas)):
        assert torch.equal(
            texts[i], text(small_llama(0), PARMLogitsProcessor(twin, preference, beta), PROMPTS + 3 * i)
        )


def test_lora_guides_change_their_weights_without_compiling_again():
    make, _ = FORMULAS["GenARM"]
    model, compiler = make(), Compiler()
    for i, preference in enumerate(([0.4, 0.6], [0.9, 0.1], [0.2, 0.8])):
        arms = {"a": "helpful", "b": "harmless"}
        with torch.compiler.set_stance("fail_on_recompile" if i else "default"):
            ours = text(
                model.get_base_model(), GenARMLogitsProcessor(arms, preference, adapters_of=model), **compiler.settings
            )
        alone = GenARMLogitsProcessor(arms, preference, adapters_of=model, shared_forward=False)
        assert torch.equal(ours, text(model.get_base_model(), alone))


def test_a_compiled_forward_does_not_miss_a_change():
    """Nor in bfloat16, where on a CPU the prompt is read with one fold, and the few tokens of a step with another."""
    model, compiler, ids = tiny_arm(small_llama(0).bfloat16()), Compiler(), PROMPTS.repeat(1, 2)
    guide, texts = PARMLogitsProcessor(model, [0.3, 0.7]), []
    settings = {"max_new_tokens": 8, "eos_token_id": -1}
    for change in ("nothing", "preference", "weights"):
        if change == "preference":
            guide.set([1.0, 0.0])
        elif change == "weights":
            with torch.no_grad():
                model.base_model.model.model.layers[0].self_attn.v_proj.adapter("default").B.weight.mul_(-3)
        texts.append(model.get_base_model().generate(ids, logits_processor=[guide], **settings, **compiler.settings))
        twin = copy.deepcopy(model)
        expected = PARMLogitsProcessor(twin, [0.3, 0.7] if change == "nothing" else [1.0, 0.0])
        eager = {"cache_implementation": "static", "disable_compile": True}
        expected = twin.get_base_model().generate(ids, logits_processor=[expected], **settings, **eager)
        assert torch.equal(texts[-1], expected)
    assert not torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[1], texts[2])
    assert len(compiler.graphs) == 1


@pytest.mark.slow
def test_a_guide_that_the_user_compiled():
    """One graph reads the prompt and one every later token, whatever the preference."""
    compiler, arm = Compiler(), tiny_arm(small_llama(1))
    guide = PARMLogitsProcessor(arm, [0.3, 0.7])
    arm.forward = torch.compile(arm.forward, backend=lambda graph, inputs: compiler.plain(graph), dynamic=True)
    base = small_llama(0)
    text(base, guide, **compiler.settings)
    assert len(compiler.graphs) == 3
    for preference in ([1.0, 0.0], [0.5, 0.5]):
        guide.set(preference)
        with torch.compiler.set_stance("fail_on_recompile"):
            ours = text(base, guide, **compiler.settings)
        assert torch.equal(ours, text(base, PARMLogitsProcessor(tiny_arm(small_llama(1)), preference)))


def test_the_users_own_cache_stays_where_it_is():
    model, compiler = tiny_arm(small_llama(0)), Compiler()
    base, guide = model.get_base_model(), PARMLogitsProcessor(model, [0.3, 0.7])
    cache = StaticCache(config=base.config, max_cache_len=24)
    addresses = []
    for i, preference in enumerate(([0.3, 0.7], [1.0, 0.0], [0.5, 0.5])):
        guide.set(preference)
        with torch.compiler.set_stance("fail_on_recompile" if i else "default"):
            ours = text(base, guide, past_key_values=cache, **compiler.own_cache)
        assert torch.equal(ours, text(base, PARMLogitsProcessor(model, preference, shared_forward=False)))
        assert {len(layer.keys) for layer in cache.layers} == {6}
        addresses.append([(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in cache.layers])
        cache.reset()
    assert addresses[0] == addresses[1] == addresses[2]


def test_an_emptied_cache_serves_other_rows_with_and_without_guidance():
    model = tiny_arm(small_llama(0))
    base, guide = model.get_base_model(), PARMLogitsProcessor(model, [0.3, 0.7])
    cache = StaticCache(config=base.config, max_cache_len=24)
    with model.disable_adapter():
        unguided = base.generate(PROMPTS, attention_mask=MASK, max_new_tokens=8, eos_token_id=-1)
    for rows in (3, 2, 1, 3):
        ours = text(base, guide, PROMPTS[:rows], past_key_values=cache)
        assert torch.equal(ours, text(base, guide, PROMPTS[:rows]))
        cache.reset()
    with model.disable_adapter():
        again = base.generate(PROMPTS, attention_mask=MASK, past_key_values=cache, max_new_tokens=8, eos_token_id=-1)
    assert torch.equal(again, unguided)
    assert type(cache) is StaticCache
    assert {len(layer.keys) for layer in cache.layers} == {3}


def test_a_static_cache_goes_on_with_and_without_guidance():
    model = tiny_arm(small_llama(0))
    base, guide = model.get_base_model(), PARMLogitsProcessor(model, [0.3, 0.7])
    settings = {"max_new_tokens": 4, "return_dict_in_generate": True, "eos_token_id": -1}
    ids = torch.cat([PROMPTS, torch.full((3, 6), 9)], 1)
    mask = torch.cat([MASK, torch.ones(3, 6, dtype=torch.long)], 1)
    for guides in ([guide], [PARMLogitsProcessor(model, [1.0, 0.0])], []):
        cache = StaticCache(config=base.config, max_cache_len=24)
        first = base.generate(
            PROMPTS, attention_mask=MASK, logits_processor=[guide], past_key_values=cache, **settings
        )
        ids = torch.cat([first.sequences, torch.full((3, 2), 9)], 1)
        with model.disable_adapter():
            went_on = base.generate(
                ids, attention_mask=mask, past_key_values=cache, logits_processor=guides, **settings
            )
            anew = base.generate(ids, attention_mask=mask, logits_processor=guides, **settings)
        assert torch.equal(went_on.sequences, anew.sequences)


def test_a_copy_of_a_model_that_has_decoded_decodes_in_one_forward_too(own_forwards):
    model = tiny_arm(small_llama(0))
    ours = text(model.get_base_model(), PARMLogitsProcessor(model, [0.3, 0.7]))
    copied = copy.deepcopy(model)
    assert torch.equal(ours, text(copied.get_base_model(), PARMLogitsProcessor(copied, [0.3, 0.7])))
    assert not own_forwards


def test_a_prompt_in_many_rows_is_read_once_into_a_static_cache():
    model, grid = tiny_arm(small_llama(0)), torch.stack([torch.linspace(0, 1, 11), torch.linspace(1, 0, 11)], 1)
    compiler, base, ids = Compiler(), model.get_base_model(), PROMPTS[1:2].repeat(11, 1)

    def sweep(**settings):
        guide = PARMLogitsProcessor(model, grid)
        return base.generate(ids, max_new_tokens=8, eos_token_id=-1, logits_processor=[guide], **settings)

    texts = [sweep(), sweep(**compiler.settings)]
    assert len(compiler.graphs) == 1
    rows = base_forwards(model)
    texts.append(sweep(cache_implementation="static", disable_compile=True))
    assert rows == [12] + [22] * 7
    assert torch.equal(texts[0], texts[1])
    assert torch.equal(texts[0], texts[2])


def test_padded_prompts_that_differ_in_the_mask_alone_are_different_in_a_static_cache():
    model, ids = tiny_arm(small_llama(0)), torch.tensor([[0, 0, 7, 8], [0, 0, 7, 8], [0, 0, 7, 8]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]])
    base, guide = model.get_base_model(), PARMLogitsProcessor(model, [0.3, 0.7])
    texts = [
        base.generate(ids, attention_mask=mask, max_new_tokens=6, logits_processor=[guide], **static)
        for static in ({}, {"cache_implementation": "static", "disable_compile": True})
    ]
    assert torch.equal(*texts)


class CompiledScorer(Scorer):
    """A term that runs a compiled function."""

    def __init__(self, backend) -> None:
        self.run = torch.compile(lambda scores: scores.sin() * 0.1, backend=backend)

    def __call__(self, input_ids, scores):
        return self.run(scores.float())


def test_answers_are_not_lost_when_a_graph_writes_over_its_outputs():
    torch._dynamo.reset()
    compiler = Compiler(backend=lambda graph, inputs, **mode: compiler.overwriting(graph, inputs))
    model = tiny_arm(small_llama(0))

    def formula(backend):
        return GuidedLogitsProcessor(BASE + CompiledScorer(backend) + LM(model, [0.3, 0.7]))

    joint = text(model.get_base_model(), formula(compiler.overwriting), **compiler.settings)
    assert torch.equal(joint, text(model.get_base_model(), formula("eager")))
    assert compiler._outputs


def merged(arm, path):
    arm.merge_adapter()
    return arm


def unloaded(arm, path):
    return arm.merge_and_unload()


def exported(arm, path):
    save_as_lora(arm, path, [0.3, 0.7])
    return PeftModel.from_pretrained(small_llama(0), path).eval()


@pytest.mark.parametrize("fixed", [merged, unloaded, exported])
@pytest.mark.parametrize("config", [PBLoraConfig, MoSLoraConfig])
def test_an_arm_fixed_at_a_preference_guides_as_the_one_that_is_not(config, fixed, tmp_path):
    def arm():
        torch.manual_seed(5)
        settings = config(
            objectives=["a", "b"], target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_weights=False
        )
        model = get_peft_model(small_llama(0), settings).eval()
        set_preference(model, [0.3, 0.7])
        return model

    settings = {"return_dict_in_generate": True, "output_scores": True}
    expected = text(small_llama(0), PARMLogitsProcessor(arm(), beta=0.5), **settings)
    guide = fixed(arm(), tmp_path)
    assert_same(text(small_llama(0), PARMLogitsProcessor(guide, beta=0.5), **settings), expected)
    if fixed is exported:
        joint = text(guide.get_base_model(), PARMLogitsProcessor(guide, beta=0.5), **settings)
        assert_same(joint, expected)


def test_a_merged_arm_has_one_preference():
    arm = tiny_arm(small_llama(0))
    set_preference(arm, [0.3, 0.7])
    guide = PARMLogitsProcessor(merged(arm, None), [0.3, 0.7])
    text(small_llama(0), guide)
    guide.set([1.0, 0.0])
    with pytest.raises(ValueError, match="is merged into the base weights at one preference"):
        text(small_llama(0), guide)
    with pytest.raises(ValueError, match="'default' is merged into the weights, so the model can't run without it"):
        text(small_llama(0), GuidedLogitsProcessor(BASE + LM(arm, disable_adapter=True)))


@pytest.mark.parametrize("make", [lambda: tiny_arm(small_llama(0)), lambda: lora_model("helpful")])
def test_a_guide_merged_into_the_model_that_generates_is_refused(make):
    """That model is not the base model any more. The weights stay as they are, and it works again when unmerged."""
    model = make()
    base, guide = model.get_base_model(), GuidedLogitsProcessor(BASE + LM(model))
    before = text(base, guide)
    model.merge_adapter()
    weights = {name: weight.clone() for name, weight in base.state_dict().items()}
    for settings in ({}, {"cache_implementation": "static", "disable_compile": True}, {"use_cache": False}):
        with pytest.raises(ValueError, match="is merged into the weights, so the model can't run without it. Call"):
            text(base, guide, **settings)
    assert all(torch.equal(weight, weights[name]) for name, weight in base.state_dict().items())
    model.unmerge_adapter()
    assert torch.equal(text(base, guide), before)


@pytest.mark.parametrize("active", ["sft", "arm"])
def test_a_guide_beside_a_merged_adapter_is_refused(active):
    """PEFT lets no adapter act in a layer with a merged one: the guide would be the base model."""
    model = lora_model("sft", "arm")
    model.set_adapter(active)
    model.merge_adapter(["sft"])
    with pytest.raises(ValueError, match="'sft' is merged into the weights, so the model can't run with"):
        text(model.get_base_model(), GuidedLogitsProcessor(BASE + LM(model, adapter_name="arm")))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("name", ["PARM", "PARM, α and β a row", "GenARM"])
def test_inductor(name):
    make, formula = FORMULAS[name]
    compiler, model = Compiler(backend="inductor", mode="default"), make()
    assert_same(generate(model, formula(model), **compiler.settings), generate(model, formula(model)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_cuda_graphs():
    """transformers' own settings on a GPU: inductor with `mode="reduce-overhead"`."""
    torch._dynamo.reset()
    model = tiny_arm(small_llama(0)).cuda()
    base, guide = model.get_base_model(), PARMLogitsProcessor(model, [0.3, 0.7])
    cache = StaticCache(config=base.config, max_cache_len=24)
    settings = {"attention_mask": MASK.cuda(), "max_new_tokens": 8, "eos_token_id": -1, "logits_processor": [guide]}
    for preference in ([0.3, 0.7], [1.0, 0.0], [0.5, 0.5]):
        guide.set(preference)
        for static in ({"cache_implementation": "static"}, {"past_key_values": cache}):
            ours = base.generate(PROMPTS.cuda(), **settings, **static)
            assert torch.equal(ours, base.generate(PROMPTS.cuda(), **settings))
        cache.reset()
