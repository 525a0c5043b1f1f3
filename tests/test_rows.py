# SPDX-License-Identifier: Apache-2.0
"""Adapters on rows of a batch: every layer tells rows apart or says that it can't, in the calling thread alone."""

import copy
import threading
from functools import partial

import pytest
import torch
from conftest import OBJECTIVES, tiny_arm, tiny_llama
from peft import get_peft_model
from torch import nn
from transformers import OPTConfig, OPTForCausalLM

from peft_pblora import PBLoraConfig, set_preference
from peft_pblora.rows import RowPlan, acting, current_plan


IDS = torch.arange(2, 42).view(4, 10)
ROWS = torch.tensor([[1.0, 0.0], [0.25, 0.75], [0.5, 0.5], [0.0, 1.0]])
BOTH = [("default", slice(1, 3), None), ("second", slice(2, 4), None)]


def tiny_opt(seed: int = 0) -> OPTForCausalLM:
    """It flattens rows and tokens before fc1 and fc2."""
    torch.manual_seed(seed)
    config = OPTConfig(
        vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32,
        init_std=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=1, max_position_embeddings=64, dropout=0.0,
    )  # fmt: skip
    return OPTForCausalLM(config).eval()


MODELS = {
    "Llama": (tiny_llama, ["q_proj", "v_proj", "down_proj"]),
    "OPT": (tiny_opt, ["q_proj", "fc1", "fc2"]),
    "OPT, flattened layers alone": (tiny_opt, ["fc1", "fc2"]),
}
every_model = pytest.mark.parametrize("name", MODELS)


def two_adapters(name: str):
    make, targets = MODELS[name]
    arm = tiny_arm(make(), target_modules=targets)
    arm.add_adapter("second", PBLoraConfig(objectives=["one"], target_modules=targets, task_type="CAUSAL_LM"))
    for parameter_name, parameter in arm.named_parameters():
        if "second.B" in parameter_name:
            nn.init.normal_(parameter, std=0.5)
    set_preference(arm, [0.3, 0.7], "default")
    set_preference(arm, [1.0], "second")
    return arm.eval()


def logits(arm, ids, *adapters: str):
    """As PEFT has it: with these adapters on all rows."""
    if not adapters:
        with arm.disable_adapter():
            return arm(ids).logits
    arm.base_model.set_adapter(list(adapters))
    return arm(ids).logits


@every_model
@pytest.mark.parametrize("grad", [True, False], ids=["factors", "folds"])
@pytest.mark.parametrize("known", [True, False], ids=["tokens known", "tokens not known"])
def test_each_row_gets_its_own_adapters(name, grad, known):
    arm = two_adapters(name)
    expected = torch.stack([
        logits(arm, IDS)[0],
        logits(arm, IDS, "default")[1],
        logits(arm, IDS, "default", "second")[2],
        logits(arm, IDS, "second")[3],
    ])  # fmt: skip
    with torch.set_grad_enabled(grad), acting(BOTH, rows=4, tokens=10 if known else None):
        torch.testing.assert_close(arm(IDS).logits, expected, atol=1e-5, rtol=1e-5)
        with arm.disable_adapter():  # a plan says all that acts
            torch.testing.assert_close(arm(IDS).logits, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(arm(IDS).logits, logits(arm, IDS, "second"))


@every_model
@pytest.mark.parametrize("grad", [True, False], ids=["factors", "folds"])
def test_a_preference_for_each_row(name, grad):
    """Alone, on rows of a plan, and on groups of rows, whatever a model flattens."""
    arm = two_adapters(name)
    alone = []
    for row, preference in zip(IDS, ROWS):
        set_preference(arm, preference, "default")
        alone.append(logits(arm, row[None], "default"))
    expected = torch.cat(alone)
    set_preference(arm, ROWS, "default")
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(arm(IDS).logits, expected, atol=1e-5, rtol=1e-5)
        twice = torch.cat([IDS, IDS])
        base = logits(arm, IDS)
        with acting([("default", slice(4, 8), None)], rows=8, tokens=10):
            torch.testing.assert_close(arm(twice).logits, torch.cat([base, expected]), atol=1e-5, rtol=1e-5)
        with acting([("default", slice(1, 2), None)], rows=8, groups=2):
            torch.testing.assert_close(arm(twice).logits, torch.cat([base, expected]), atol=1e-5, rtol=1e-5)


@every_model
def test_rows_that_are_no_multiple_of_the_preferences(name):
    """Not even where the tokens of a flattened input happen to be one: 3 rows of 10 tokens at 2 preferences."""
    arm = two_adapters(name)
    set_preference(arm, ROWS[:2], "default")
    for part in (slice(0, 3), slice(1, 4)):
        with (
            pytest.raises(ValueError, match="set for 2 rows, but the batch has 3"),
            acting([("default", part, None)], 4),
        ):
            arm(IDS)
    assert current_plan() is None


class Routing(nn.Module):
    """Hands some of the tokens, in an order of its own, to its layer, as experts of a mixture do."""

    def __init__(self, choose):
        super().__init__()
        self.layer, self.choose = nn.Linear(8, 8), choose

    def forward(self, x):
        return self.layer(self.choose(x))


def adapted(model):
    config = PBLoraConfig(objectives=OBJECTIVES, target_modules=["layer"], init_weights=False)
    return get_peft_model(model, config).eval()


@pytest.mark.parametrize(
    ("choose", "shape"),
    [
        (lambda x: x.flatten(0, 1)[:7], (7, 8)),
        (lambda x: x.flatten(0, 1)[:8], (8, 8)),  # a multiple of the rows, but not all of their tokens
        (lambda x: x.transpose(0, 1), (5, 4, 8)),
        (lambda x: x.repeat(2, 1, 1), (8, 5, 8)),
        (lambda x: x[0, 0], (8,)),
    ],
)
def test_inputs_whose_rows_can_not_be_told_apart_are_refused(choose, shape):
    arm = adapted(Routing(choose))
    set_preference(arm, [0.3, 0.7])
    x = torch.randn(4, 5, 8)
    message = rf"input of shape \({', '.join(map(str, shape))},?\) in a batch of 4 rows"
    with acting([("default", slice(2, 4), None)], rows=4, tokens=5), pytest.raises(ValueError, match=message):
        arm(x)
    expected = arm(x)
    with acting([("default", slice(0, 4), None)], rows=4, tokens=5):
        torch.testing.assert_close(arm(x), expected)  # all rows alike
        set_preference(arm, ROWS)
        with pytest.raises(ValueError, match=message):
            arm(x)


def test_pooled_inputs_have_one_entry_a_row():
    arm = adapted(Routing(lambda x: x[:, -1]))
    set_preference(arm, [0.3, 0.7])
    x = torch.randn(4, 5, 8)
    with arm.disable_adapter():
        base = arm(x)
    expected = torch.cat([base[:2], arm(x)[2:]])
    with acting([("default", slice(2, 4), None)], rows=4, tokens=5):
        torch.testing.assert_close(arm(x), expected)


@pytest.mark.parametrize("part", [slice(3, 5), slice(-1, 2), slice(2, 1), slice(0, 4, 2)])
def test_slices_beyond_the_rows(part):
    with pytest.raises(ValueError, match="is to act on slice.* but there are 4 rows"):
        RowPlan([("default", part, None)], 4)
    with pytest.raises(ValueError, match="but there are 4 groups of rows"):
        RowPlan([("default", part, None)], 12, groups=4)


def test_merged_adapters_act_on_no_rows():
    arm = two_adapters("Llama")
    arm.merge_adapter(["second"])
    with acting(BOTH, rows=4), pytest.raises(ValueError, match=r"\['second'\] are merged .* `unmerge_adapter\(\)`"):
        arm(IDS)


def test_a_plan_ends_with_its_block_and_acts_in_its_thread_alone():
    arm, found = two_adapters("Llama"), []
    arm.set_adapter("default")
    expected = arm(IDS).logits

    def elsewhere():
        found.append((current_plan(), arm(IDS).logits))

    with pytest.raises(KeyboardInterrupt), acting([], rows=4):
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        with acting(BOTH, rows=4) as inner:
            assert current_plan() is inner
        torch.testing.assert_close(arm(IDS).logits, logits(copy.deepcopy(arm), IDS))
        raise KeyboardInterrupt
    assert current_plan() is None
    assert found[0][0] is None
    assert torch.equal(found[0][1], expected)
    assert torch.equal(arm(IDS).logits, expected)


@pytest.mark.parametrize("where", ["around", "inside"])
def test_compiled_without_a_break_and_once_for_all_preferences_and_rows(where):
    """Whether the block is around the compiled call or in it. The second number of rows makes it dynamic."""
    torch._dynamo.reset()
    arm, graphs = tiny_arm(tiny_opt(), target_modules=["fc1"]), []
    layer = arm.get_base_model().model.decoder.layers[0].fc1

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def forward(x, rows, run=layer):
        with acting([("default", slice(1, 2), None)], rows=rows, tokens=5, groups=2):
            return run(x)

    if where == "inside":
        compiled = torch.compile(forward, fullgraph=True, backend=backend)
    else:
        compiled = partial(forward, run=torch.compile(layer, fullgraph=True, backend=backend))
    for i, rows in enumerate((6, 10, 14, 22)):
        set_preference(arm, ROWS[i])
        x = torch.randn(rows * 5, 32)
        with torch.no_grad(), torch.compiler.set_stance("fail_on_recompile" if i > 1 else "default"):
            found, half = compiled(x, rows), rows // 2 * 5
            torch.testing.assert_close(found, forward(x, rows), atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(found[:half], layer.base_layer(x)[:half])
            torch.testing.assert_close(found[half:], layer(x)[half:], atol=1e-5, rtol=1e-5)
    assert len(graphs) == 2
    assert not any("sizes" in node.name for node in graphs[1].graph.nodes if node.op == "placeholder" and node.users)
