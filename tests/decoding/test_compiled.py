# SPDX-License-Identifier: Apache-2.0
"""Guided models with static caches and compiled forwards: the answers of the default path, one compilation for all α.

The compilers here run what was traced as it is, so that what is traced, and how often, is seen in seconds.
"""

import copy
import shutil

import pytest
import torch
from conftest import tiny_arm, tiny_gpt2, tiny_llama
from decoding.tables import BETAS, MASK, PROMPTS, ROWS
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import CompileConfig, StaticCache

from peft_pblora import MoSLoraConfig, PBLoraConfig, save_as_lora, set_preference
from peft_pblora.adapter import Fold
from trl_parm import BASE, LM, PARM, GenARM, Guided, GuidedLogitsProcessor, PARMLogitsProcessor, Scorer


EAGER = {"cache_implementation": "static", "disable_compile": True}


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
    made, make = [], Fold.__init__
    monkeypatch.setattr(Fold, "__init__", lambda self, *args: (made.append(self), make(self, *args))[1])
    return made


def small_llama(seed: int = 0):
    return tiny_llama(seed, num_hidden_layers=1)


def loras():
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    torch.manual_seed(3)
    model = get_peft_model(small_llama(0), config, adapter_name="helpful")
    model.add_adapter("harmless", config)
    return model.eval()


def gated():
    torch.manual_seed(5)
    config = MoSLoraConfig(objectives=["a", "b"], target_modules=["q_proj"], task_type="CAUSAL_LM", init_weights=False)
    return get_peft_model(small_llama(0), config).eval()


def text(model, ids=PROMPTS, **settings):
    return model.generate(ids, attention_mask=MASK[: len(ids)], max_new_tokens=8, eos_token_id=-1, **settings)


def on_base(arm, formula):
    return Guided(arm.get_base_model(), formula)


MODELS = {
    "PARM": (lambda: tiny_arm(small_llama(0)), lambda m: BASE + LM(m, [0.3, 0.7])),
    "PARM, GPT-2": (
        lambda: tiny_arm(tiny_gpt2(0), target_modules=["c_attn"]), lambda m: BASE + 2.0 * LM(m, [0.3, 0.7])
    ),
    "two preferences, one for each row, and none": (
        lambda: tiny_arm(small_llama(0)),
        lambda m: BASE + LM(m, ROWS) - 0.5 * LM(m, [0.5, 0.5]) + 0.2 * LM(m, disable_adapter=True),
    ),
    "MoSLoRA": (gated, lambda m: BASE + LM(m, [0.5, 0.5])),
    "GenARM": (
        loras, lambda m: BASE + 0.4 * LM(m, adapter_name="helpful") + 0.6 * LM(m, adapter_name="harmless")
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_a_compiled_forward_answers_as_the_default_one(name):
    make, formula = MODELS[name]
    model, compiler = make(), Compiler()
    guided = on_base(model, formula(model))
    settings = {"output_scores": True, "return_dict_in_generate": True}
    compiled, plain = text(guided, **settings, **compiler.settings), text(guided, **settings)
    assert len(compiler.graphs) == 1
    assert torch.equal(compiled.sequences, plain.sequences)
    for ours, theirs in zip(compiled.scores, plain.scores, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("shared", "rows"), [(True, False), (True, True), (False, True)], ids=["one α", "α and β a row", "separate guide"]
)
def test_preference_beta_and_text_change_without_compiling_again(shared, rows, folds):
    """And each adapted layer is folded once for each α, however many tokens follow: W(α) is not in the graph."""
    preferences = [ROWS, ROWS.flip(0), ROWS.flip(1)] if rows else [[0.3, 0.7], [1.0, 0.0], [0.5, 0.5]]
    betas = [BETAS, BETAS + 1, BETAS + 2] if rows else [0.5, 1.0, 2.0]
    arm, twin = tiny_arm(small_llama(0)), tiny_arm(small_llama(0))
    base = arm.get_base_model() if shared else small_llama(0)
    compiler, texts = Compiler(fullgraph=True), []
    for i, (preference, beta) in enumerate(zip(preferences, betas)):
        with torch.compiler.set_stance("fail_on_recompile" if i else "default"):
            guided = PARM(base, arm, preference, beta)
            folds.clear()
            texts.append(text(guided, PROMPTS + 3 * i, **compiler.settings))
            assert len(folds) == 3
            text(guided, PROMPTS + i, **compiler.settings)
            assert len(folds) == 3
    assert len(compiler.graphs) == (1 if shared else 2)
    inputs = [node.name for graph in compiler.graphs for node in graph.graph.nodes if node.op == "placeholder"]
    assert any("fold" in name for name in inputs)
    assert not any("_core_" in name or "preference" in name for name in inputs)
    for i, (preference, beta) in enumerate(zip(preferences, betas)):
        assert torch.equal(texts[i], text(PARM(small_llama(0), twin, preference, beta), PROMPTS + 3 * i))


def test_lora_guides_change_their_weights_without_compiling_again():
    model, compiler = loras(), Compiler()
    for i, preference in enumerate(([0.4, 0.6], [0.9, 0.1], [0.2, 0.8])):
        arms = {"a": "helpful", "b": "harmless"}
        guided = GenARM(model.get_base_model(), arms, preference, adapters_of=model)
        with torch.compiler.set_stance("fail_on_recompile" if i else "default"):
            ours = text(guided, **compiler.settings)
        assert torch.equal(ours, text(guided))
    assert len(compiler.graphs) == 1


def test_a_compiled_forward_does_not_miss_a_change():
    """Nor in bfloat16, where on a CPU the prompt is read with one fold, and the few tokens of a step with another."""
    model, compiler, ids = tiny_arm(small_llama(0).bfloat16()), Compiler(), PROMPTS.repeat(1, 2)
    texts, preference = [], [0.3, 0.7]
    settings = {"max_new_tokens": 8, "eos_token_id": -1}
    for change in ("nothing", "preference", "weights"):
        if change == "preference":
            preference = [1.0, 0.0]
        elif change == "weights":
            with torch.no_grad():
                model.base_model.model.model.layers[0].self_attn.v_proj.adapter("default").B.weight.mul_(-3)
        guided = PARM(model.get_base_model(), model, preference)
        texts.append(guided.generate(ids, **settings, **compiler.settings))
        twin = copy.deepcopy(model)
        expected = PARM(twin.get_base_model(), twin, preference).generate(ids, **settings, **EAGER)
        assert torch.equal(texts[-1], expected)
    assert not torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[1], texts[2])
    assert len(compiler.graphs) == 1


def test_the_cache_that_a_call_returned_goes_on_where_it_stays():
    """`reset` empties it and keeps its memory for the next call with as many rows."""
    model, compiler = tiny_arm(small_llama(0)), Compiler()
    guided = PARM(model.get_base_model(), model, [0.3, 0.7])
    first = text(guided, return_dict_in_generate=True, **compiler.settings)
    cache = getattr(first, "cache", None) or first.past_key_values
    addresses = [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in cache.layers]
    assert {len(layer.keys) for layer in cache.layers} == {6}
    cache.reset()
    config = {"compile_config": compiler.settings["compile_config"]}
    with torch.compiler.set_stance("fail_on_recompile"):
        again = text(guided, past_key_values=cache, **config)
    assert torch.equal(again, first.sequences)
    assert addresses == [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in cache.layers]


def test_a_cache_that_no_guided_model_made_is_refused():
    model = tiny_arm(small_llama(0))
    cache = StaticCache(config=model.config, max_cache_len=24)
    with pytest.raises(ValueError, match="This StaticCache was not made by a guided model"):
        text(PARM(model.get_base_model(), model, [0.3, 0.7]), past_key_values=cache)


def test_a_prompt_in_many_rows_is_read_as_it_stands_into_a_static_cache():
    model, grid = tiny_arm(small_llama(0)), torch.stack([torch.linspace(0, 1, 11), torch.linspace(1, 0, 11)], 1)
    compiler, ids = Compiler(), PROMPTS[1:2].repeat(11, 1)
    guided = PARM(model.get_base_model(), model, grid)
    settings = {"max_new_tokens": 8, "eos_token_id": -1}
    texts = [guided.generate(ids, **settings, **more) for more in ({}, compiler.settings, EAGER)]
    assert len(compiler.graphs) == 1
    assert torch.equal(texts[0], texts[1])
    assert torch.equal(texts[0], texts[2])


def test_padded_prompts_that_differ_in_the_mask_alone_are_different():
    model, ids = tiny_arm(small_llama(0)), torch.tensor([[0, 0, 7, 8], [0, 0, 7, 8], [0, 0, 7, 8]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]])
    guided = PARM(model.get_base_model(), model, [0.3, 0.7])
    texts = [guided.generate(ids, attention_mask=mask, max_new_tokens=6, **more) for more in ({}, EAGER)]
    assert torch.equal(*texts)


class CompiledScorer(Scorer):
    """A term that runs a compiled function."""

    def __init__(self, backend) -> None:
        self.run = torch.compile(lambda scores: scores.sin() * 0.1, backend=backend)

    def __call__(self, step):
        return self.run(step.scores.float())


def test_answers_are_not_lost_when_a_graph_writes_over_its_outputs():
    torch._dynamo.reset()
    compiler = Compiler(backend=lambda graph, inputs, **mode: compiler.overwriting(graph, inputs))
    model = tiny_arm(small_llama(0))

    def guided(backend):
        return on_base(model, BASE + CompiledScorer(backend) + LM(model, [0.3, 0.7]))

    assert torch.equal(text(guided(compiler.overwriting), **compiler.settings), text(guided("eager")))
    assert compiler._outputs


def merged(arm, path):
    arm.merge_adapter()
    return arm


def unloaded(arm, path):
    return arm.merge_and_unload()


def exported(arm, path):
    save_as_lora(arm, path / "lora", [0.3, 0.7])
    return PeftModel.from_pretrained(small_llama(0), path / "lora").eval()


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

    expected = text(PARM(small_llama(0), arm(), beta=0.5))
    guide = fixed(arm(), tmp_path)
    assert torch.equal(text(PARM(small_llama(0), guide, beta=0.5)), expected)
    if fixed is exported:
        assert torch.equal(text(PARM(guide.get_base_model(), guide, beta=0.5)), expected)


def test_a_merged_arm_has_one_preference():
    arm = tiny_arm(small_llama(0))
    set_preference(arm, [0.3, 0.7])
    merged(arm, None)
    text(PARM(small_llama(0), arm, [0.3, 0.7]))
    with pytest.raises(ValueError, match="is merged into the weights at the preference"):
        text(PARM(small_llama(0), arm, [1.0, 0.0]))
    with pytest.raises(ValueError, match="'default' is merged into the weights, so the model can't run without it"):
        text(Guided(small_llama(0), BASE + LM(arm, disable_adapter=True)))


@pytest.mark.parametrize("make", [lambda: tiny_arm(small_llama(0)), loras])
@pytest.mark.parametrize("door", ["model", "processor"])
def test_a_guide_merged_into_the_model_that_generates_is_refused(door, make):
    """That model is not the base model any more. The weights stay as they are, and it works again when unmerged."""
    model = make()
    base, formula = model.get_base_model(), BASE + LM(model)
    guided = {"model": lambda: (Guided(base, formula), {}),
              "processor": lambda: (base, {"logits_processor": [GuidedLogitsProcessor(formula)]})}[door]  # fmt: skip
    chosen, more = guided()
    before = text(chosen, **more)
    model.merge_adapter([formula.terms()[1][1].adapter_names[0]])
    weights = {name: weight.clone() for name, weight in base.state_dict().items()}
    for settings in ({}, EAGER, {"use_cache": False}):
        with pytest.raises(ValueError, match="is merged into the weights, so"):
            text(chosen, **more, **settings)
    assert all(torch.equal(weight, weights[name]) for name, weight in base.state_dict().items())
    model.unmerge_adapter()
    assert torch.equal(text(chosen, **more), before)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("name", ["PARM", "GenARM"])
def test_inductor(name):
    make, formula = MODELS[name]
    compiler, model = Compiler(backend="inductor", mode="default"), make()
    guided = on_base(model, formula(model))
    assert torch.equal(text(guided, **compiler.settings), text(guided))


def test_a_processor_leaves_the_base_model_to_compile_alone():
    model, compiler = tiny_arm(small_llama(0)), Compiler()
    base = model.get_base_model()
    for i, preference in enumerate(([0.3, 0.7], [1.0, 0.0])):
        guide = [PARMLogitsProcessor(model, preference)]
        with torch.compiler.set_stance("fail_on_recompile" if i else "default"):
            ours = text(base, logits_processor=guide, **compiler.settings)
        assert torch.equal(ours, text(PARM(base, model, preference)))
    assert len(compiler.graphs) == 1


@pytest.mark.cuda
def test_cuda_graphs():
    """transformers' own settings on a GPU: inductor with `mode="reduce-overhead"`."""
    torch._dynamo.reset()
    model = tiny_arm(small_llama(0)).cuda()
    settings = {"attention_mask": MASK.cuda(), "max_new_tokens": 8, "eos_token_id": -1}
    for preference in ([0.3, 0.7], [1.0, 0.0], [0.5, 0.5]):
        guided = PARM(model.get_base_model(), model, preference)
        ours = guided.generate(PROMPTS.cuda(), cache_implementation="static", **settings)
        assert torch.equal(ours, guided.generate(PROMPTS.cuda(), **settings))
