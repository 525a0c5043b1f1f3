# SPDX-License-Identifier: Apache-2.0
"""pytest plugin: runs the tests of PEFT's own matrix with one of our configurations in the place of PEFT's.

Nothing in PEFT is changed. Its tests are parametrized over module-level lists; where a test uses such a list, its rows
are replaced by ours, and tests that use none are left out.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from typing import Any

import pytest

import peft_pblora


CONFIG = getattr(peft_pblora, os.environ["PEFT_MATRIX_CONFIG"])
# A small scaling: some tests train with a learning rate of 0.5 on inputs up to 90.
SMALL = {
    "PBLoraConfig": {"r1": 2, "r2": 2, "lora_alpha": 2},
    "SVDLoraConfig": {"r": 2, "lora_alpha": 16},
    "MoSLoraConfig": {"r": 2, "lora_alpha": 1},
}[CONFIG.__name__]
MIXED_BATCH_TESTS = ("test_mixed_adapter_batches[", "test_generate_with_mixed_adapter_batches[")
NEEDS_NETWORK = ("test_from_pretrained_cache_dir",)


def custom_models(_: str) -> list[tuple]:
    targets: list[dict[str, Any]] = [
        {"target_modules": "lin0"},
        {"target_modules": ["lin0"]},
        {"target_modules": ["lin1"]},
        {"target_modules": ["lin0", "lin1"]},
        {"target_modules": ["lin0"], "modules_to_save": ["lin1"]},
        {"target_modules": ["lin0", "lin1"], "modules_to_save": ["lin1"]},
        {"target_modules": ["lin0"], "objectives": ["a", "b", "c"]},
    ]
    rows = [(f"Vanilla MLP {i}", "MLP", CONFIG, {**SMALL, **t}) for i, t in enumerate(targets, 1)]
    return [*rows, ("Conv1D", "EmbConv1D", CONFIG, {**SMALL, "target_modules": ["conv1d"]})]


def several_adapters(_: str) -> list[tuple]:
    first, second = ({**SMALL, "target_modules": [name], "init_weights": False} for name in ("lin0", "lin1"))
    return [("Same", "ours", CONFIG, first, dict(first)), ("Different", "ours", CONFIG, first, second)]


def mixed_adapters(_: str) -> list[tuple]:
    return [("mixed", *(CONFIG(**SMALL, target_modules=["lin0"], init_weights=False) for _ in range(2)))]


def for_task(task: str) -> Callable[[str], list[tuple]]:
    return lambda _: [(CONFIG, {**SMALL, "task_type": task, "target_modules": None})]


def all_configs(module: str) -> list[tuple]:
    tasks = {
        "decoder": "CAUSAL_LM", "encoder_decoder": "SEQ_2_SEQ_LM", "feature": "FEATURE_EXTRACTION", "seq": "SEQ_CLS",
    }  # fmt: skip
    return for_task(next(task for name, task in tasks.items() if module.startswith(f"test_{name}")))(module)


def cases(module: str) -> list[tuple]:
    if module == "test_quantization":
        return [(CONFIG, {**SMALL, "target_modules": ["q_proj", "v_proj"]})]
    return custom_models(module)


ROWS: dict[str, Callable[[str], list]] = {
    "TEST_CASES": cases,
    "ALL_PEFT_CONFIG_CLASSES": lambda _: [CONFIG],
    "ALL_CONFIG_CLASSES": lambda _: [(CONFIG, {})],
    "LAYER_INDEXING_CONFIG_CLASSES": lambda _: [(CONFIG, {})],
    "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES": several_adapters,
    "MIXED_ADAPTER_TEST_CASES": mixed_adapters,
    "ALL_CONFIGS": all_configs,
    "TOKEN_CLS_CONFIGS": for_task("TOKEN_CLS"),
    "QA_CONFIGS": for_task("QUESTION_ANS"),
}


@pytest.hookimpl(tryfirst=True)
def pytest_make_collect_report(collector: pytest.Collector) -> None:
    """Replaces the rows of every test of a module before pytest collects it."""
    if not isinstance(collector, pytest.Module) or hasattr(collector.obj, "_rows_replaced"):
        return
    module = collector.obj
    module._rows_replaced = True
    lists = {id(getattr(module, name)): name for name in ROWS if hasattr(module, name)}
    classes = [c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__]
    functions = [f for holder in (module, *classes) for f in vars(holder).values() if inspect.isfunction(f)]
    for function in functions:
        marks = getattr(function, "pytestmark", [])
        for index, mark in enumerate(marks):
            name = lists.get(id(mark.args[1])) if mark.name == "parametrize" else None
            if name:
                rows = ROWS[name](module.__name__.rpartition(".")[-1])
                marks[index] = pytest.mark.parametrize(mark.args[0], rows, **mark.kwargs).mark
                function._uses_our_rows = True


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    ours = [item for item in items if getattr(getattr(item, "function", None), "_uses_our_rows", False)]
    for item in ours:
        if any(name in item.nodeid for name in NEEDS_NETWORK):
            item.add_marker(pytest.mark.skip(reason="downloads into a fresh cache"))
    config.hook.pytest_deselected(items=[item for item in items if item not in ours])
    items[:] = ours


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item: pytest.Item):
    """Mixed batches and Conv1D: upstream skips them for every class but some it lists by name; ours supports them."""
    from tests import testing_common

    patch = pytest.MonkeyPatch()
    patch.setattr(testing_common, "_skip_if_conv1d_not_supported", lambda *_: None)
    if any(name in item.nodeid for name in MIXED_BATCH_TESTS):
        for module in (item.module, testing_common):
            patch.setattr(module, "LoraConfig", CONFIG, raising=False)
    yield
    patch.undo()


def pytest_sessionstart() -> None:
    """All model ids are in the cache, so PEFT's tests never need to look them up online."""
    from tests import testing_utils

    class AllCached(dict):
        def __contains__(self, key: object) -> bool:
            return True

        def __missing__(self, key: str) -> int:
            return 0

    testing_utils._HUB_MODEL_ACCESSES = AllCached()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--regression", action="store_true", help="an option of PEFT's own conftest")


def pytest_configure(config: pytest.Config) -> None:
    for marker in ("regression", "single_gpu_tests", "multi_gpu_tests", "bitsandbytes"):
        config.addinivalue_line("markers", f"{marker}: a marker of PEFT's tests")
