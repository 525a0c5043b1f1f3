# SPDX-License-Identifier: Apache-2.0
"""Every method of `evaluate` that can be served: the same texts, by requests at once with preferences of their own."""

from concurrent.futures import ThreadPoolExecutor

import pytest


pytest.importorskip("openai", reason="needs the extra `dev`")
pytest.importorskip("prometheus_client", reason="needs the extra `serve`")

from server.running import ESCAPES, OBJECTIVES, arguments, running, save_models

from trl_parm.evaluation.evaluate import evaluate
from trl_parm.evaluation.methods import METHODS
from trl_parm.evaluation.models import Models
from trl_parm.preference_text import PreferenceText


REFUSED = {"args", "transfer_q", "rewarded_soups"}
SAME = {"svd_lora", "uniarm"}
"""Other names of `parm`."""
PROMPTS = ["w3 w9", "w4", "w7 w8 w9 w10 w11"]
ALPHAS = [[0.3, 0.7], [1.0, 0.0]]


@pytest.fixture(scope="module")
def methods(tmp_path_factory):
    """All methods, and the folder of their models."""
    folder = tmp_path_factory.mktemp("served")
    save_models(folder)
    PreferenceText(OBJECTIVES, "{preference} ").save(folder / "helpful")
    own = {objective: str(folder / objective) for objective in OBJECTIVES}
    arm = {"arm": str(folder / "arm")}
    settings = {
        "untrained_arm": {**arm, "beta": 0.5}, "parm": {**arm, "beta": 0.5}, "parm_shuffled": arm, "arm_alone": arm,
        "parm_prompt": {"arm": str(folder / "helpful"), "beta": 0.5}, "genarm": {"arms": own, "beta": 0.7},
        "mod": {"policies": own}, "mod_w2s": {"policies": own, "reference": str(folder / "base")},
        "cage": arm, "worst_case": {**arm, "beta": 0.5},
    }  # fmt: skip
    return {name: {"method": name, "name": name, **of} for name, of in settings.items()}, folder


@pytest.fixture(scope="module")
def here(methods):
    of_each, folder = methods
    everything = list(of_each.values()) + [{**of_each["mod"], "name": "mod fkl", "divergence": "forward_kl"}]
    with running(arguments(folder, arm=None, methods=everything)) as here:
        yield here


def test_all_methods_are_served_or_refused(methods):
    assert {*methods[0], *REFUSED, *SAME, "base"} == set(METHODS)


def expected(folder, method, alphas) -> list[str]:
    table = evaluate(
        Models(str(folder / "base"), "float32"), [method], alphas, PROMPTS, dict.fromkeys(OBJECTIVES), None,
        max_new_tokens=10, escape_control_tokens=ESCAPES,
    )  # fmt: skip
    return list(table["response"])


NAMES = ["untrained_arm", "parm", "parm_shuffled", "arm_alone", "parm_prompt", "genarm", "mod", "mod fkl", "mod_w2s",
         "cage", "worst_case"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_texts_are_those_of_evaluate(here, methods, name):
    of_each, folder = methods
    method = of_each.get(name) or {**of_each["mod"], "name": name, "divergence": "forward_kl"}
    control = METHODS[method["method"]].control
    alphas = [None] if control else ALPHAS
    asked = [(prompt, {} if α is None else {"preference": α}) for α in alphas for prompt in PROMPTS]
    with ThreadPoolExecutor(len(asked)) as pool:
        found = list(pool.map(lambda one: here.chat(one[0], name, max_tokens=10, **one[1]), asked))
    assert [answer.choices[0].message.content for answer in found] == expected(folder, method, ALPHAS)
    own = None if name in ("arm_alone", "cage") or "policies" in method else method.get("beta", 1.0)
    assert {answer.beta for answer in found} == {own}


@pytest.mark.parametrize("name", ["genarm", "parm_prompt", "worst_case", "untrained_arm"])
def test_beta_of_a_request(here, methods, name):
    """Beside others with the method's own."""
    of_each, folder = methods
    with ThreadPoolExecutor(6) as pool:
        own = [pool.submit(here.chat, prompt, name, beta=2.5, max_tokens=10) for prompt in PROMPTS]
        others = [pool.submit(here.chat, prompt, name, max_tokens=10) for prompt in PROMPTS]
        found = [[one.result().choices[0].message.content for one in asked] for asked in (own, others)]
    α = [[0.5, 0.5]]
    assert found == [
        expected(folder, {**of_each[name], "beta": 2.5}, α), expected(folder, of_each[name], α)
    ]  # fmt: skip
