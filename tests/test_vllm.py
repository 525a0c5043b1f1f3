# SPDX-License-Identifier: Apache-2.0
"""Coupled requests on vLLM itself, against transformers' guided `generate`. `make test-vllm` runs it.

The engine has little room, of odd sizes: seven places, tokens for a few prompts, memory for a few texts.
"""

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_arm, tiny_llama, tiny_tokenizer

from peft_pblora import save_as_lora, set_preference
from trl_parm.noise import Sampling
from trl_parm.serving import Guidance, combine


# Errors of the engine reach the test as they are.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
vllm = pytest.importorskip("vllm", reason="vLLM is not installed; `make test-vllm` installs a build for CPUs")

from vllm.inputs import tokens_input  # noqa: E402
from vllm.lora.request import LoRARequest  # noqa: E402

from trl_parm import GenARMLogitsProcessor, PARMLogitsProcessor  # noqa: E402
from trl_parm.serving import AsyncGuidance, guided_generate  # noqa: E402
from trl_parm.serving.guidance import CoupledRequest, coupled_requests  # noqa: E402


PREFERENCES = [[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]]
TOKENS = 24
SETTINGS = dict(
    dtype="float32", enforce_eager=True, max_model_len=64, max_num_seqs=7, max_num_batched_tokens=61, block_size=32,
    num_gpu_blocks_override=9, enable_lora=True, max_lora_rank=8, max_loras=4, disable_log_stats=True,
    kv_cache_memory_bytes=2**25, logits_processors=["trl_parm.serving:CoupledLogitsProcessorV1"],
)  # fmt: skip


def models():
    """A base model that the CPU back end of vLLM has kernels for, and an ARM on the same weights."""
    changes = {"hidden_size": 128, "intermediate_size": 96}
    return tiny_llama(0, **changes), tiny_arm(tiny_llama(0, **changes))


def prompts():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(2, 64, (3 + 2 * i,), generator=generator).tolist() for i in range(8)]


def write_models(folder: Path) -> list[Path]:
    base, arm = models()
    base.save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    return save_as_lora(arm, folder / "arm", torch.tensor(PREFERENCES), rank=8)


def guides(folders) -> list[Guidance]:
    """Each of the eight prompts has an α and a β of its own."""
    loras = [LoRARequest(folder.name, number, str(folder)) for number, folder in enumerate(folders, 1)]
    return [Guidance(loras[i % 3], beta=[0.5, 1.0, 2.0][i // 3]) for i in range(8)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("vllm")


@pytest.fixture(scope="module")
def folders(folder):
    return write_models(folder)


@pytest.fixture(scope="module")
def llm(folder, folders):
    return vllm.LLM(str(folder / "base"), **SETTINGS)


def texts(outputs) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


def transformers_text(base, prompt, *processors) -> list[int]:
    ids = torch.tensor([prompt])
    text = base.generate(
        ids, attention_mask=torch.ones_like(ids), logits_processor=list(processors), max_new_tokens=TOKENS
    )
    return text[0, len(prompt) :].tolist()


def parm_texts(folders) -> list[list[int]]:
    """The guided greedy texts of transformers."""
    base, arm = models()
    return [
        transformers_text(base, prompt, PARMLogitsProcessor(arm, PREFERENCES[i % 3], beta=own.beta))
        for i, (prompt, own) in enumerate(zip(prompts(), guides(folders)))
    ]


def greedy(**changes):
    return vllm.SamplingParams(temperature=0.0, max_tokens=TOKENS, **changes)


def test_eight_prompts_with_their_own_alpha_and_beta_are_those_of_transformers(llm, folders):
    found = texts(guided_generate(llm, prompts(), guides(folders), greedy()))
    expected = parm_texts(folders)
    base, _ = models()
    unguided = [transformers_text(base, prompt) for prompt in prompts()]
    same = sum(a == b for a, b in zip(found, expected))
    moved = sum(a != b for a, b in zip(found, unguided))
    print(f"{same} of 8 identical to transformers' guided greedy text, {moved} of 8 other than the unguided text")
    assert same == 8
    assert moved == 8


def test_genarm_takes_a_request_for_each_lora(llm, folders):
    base, arm = models()
    loras = [guides(folders)[0].loras[0], guides(folders)[2].loras[0]]
    own = Guidance(loras, beta=0.5, weights=[0.3, 0.7])
    found = texts(guided_generate(llm, prompts()[:3], own, greedy()))
    _, other = models()
    for model, preference in ((arm, PREFERENCES[0]), (other, PREFERENCES[2])):
        set_preference(model, preference)
    guide = GenARMLogitsProcessor({"helpful": arm, "harmless": other}, [0.3, 0.7], beta=0.5)
    assert found == [transformers_text(base, prompt, guide) for prompt in prompts()[:3]]


def test_samples_are_those_of_the_formula(llm, folders):
    """With the noise of its seed, every sampled token is the one that transformers' logits give."""
    base, arm = models()
    params = vllm.SamplingParams(temperature=0.8, top_p=0.95, top_k=40, seed=7, max_tokens=TOKENS)
    found = texts(guided_generate(llm, prompts(), guides(folders), params))
    for i, (prompt, text) in enumerate(zip(prompts(), found)):
        set_preference(arm, PREFERENCES[i % 3])
        ids = torch.tensor([prompt + text])
        with torch.no_grad():
            scores = combine(base(ids).logits[0], arm(ids).logits[0], 1 / guides(folders)[i].beta)
        at = slice(len(prompt) - 1, len(prompt) + len(text) - 1)
        expected = Sampling(0.8, 40, 0.95).noisy(scores[at], [7] * len(text), range(len(text))).argmax(-1)
        assert text == expected.tolist()
    assert len({tuple(text) for text in found}) == 8


def test_samples_differ_by_seed_and_not_by_their_company(llm, folders):
    own = guides(folders)[0]
    params = [vllm.SamplingParams(temperature=1.0, seed=seed, max_tokens=TOKENS) for seed in range(6)]
    together = texts(guided_generate(llm, [prompts()[0]] * 6, own, params))
    assert len({tuple(text) for text in together}) == 6
    assert texts(guided_generate(llm, prompts()[:1], own, params[4])) == [together[4]]


def test_a_lora_served_alone_is_the_arm_at_its_preference(llm, folders):
    _, arm = models()
    loras = [own.loras[0] for own in guides(folders)[:3]]
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts()[:3]], greedy(), lora_request=loras, use_tqdm=False
    )
    for preference, prompt, text in zip(PREFERENCES, prompts(), texts(outputs), strict=False):
        set_preference(arm, preference)
        assert transformers_text(arm, prompt) == text


def submit(llm, families):
    """Hands families to the engine as they are, with no regard to its room, and returns the texts of every step."""
    engine = llm.llm_engine
    engine.sleep(level=0, mode="keep")
    for requests, prompt in families:
        for request in requests:
            engine.add_request(request.name, tokens_input(prompt), request.params, lora_request=request.lora)
    engine.wake_up(["scheduling"])
    steps = []
    try:
        while engine.has_unfinished_requests():
            # The engine goes on writing into its lists.
            steps += [(output.request_id, list(output.outputs[0].token_ids)) for output in engine.step()]
    finally:
        engine.abort_request([request.name for requests, _ in families for request in requests])
    return steps


def family(name, own, tokens=TOKENS, temperature=0.0):
    params = vllm.SamplingParams(temperature=temperature, seed=1, max_tokens=tokens, ignore_eos=True)
    return coupled_requests(name, params, own)


@pytest.mark.parametrize("temperature", [0.0, 1.2])
def test_both_requests_write_the_same_token_in_every_step(llm, folders, temperature):
    requests = family("pair", guides(folders)[0], temperature=temperature)
    for request in requests:
        request.params.output_kind = vllm.sampling_params.RequestOutputKind.CUMULATIVE
    steps = submit(llm, [(requests, prompts()[0])])
    base, guide = ([text for name, text in steps if name == request.name] for request in requests)
    assert base == guide
    assert [len(text) for text in base] == list(range(1, TOKENS + 1))


def ordinary(name):
    params = vllm.SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    return [CoupledRequest(name, params, None)]


def early(own):
    requests = family("a", own)
    requests[1].params.max_tokens = 3
    return [(requests, [5, 6])]


APART = {
    "the guide never came": (lambda own: [(family("a", own)[:1], [5, 6])], "guide 1 missing"),
    "the base never came": (lambda own: [(family("a", own)[1:], [5, 6])], "the base missing"),
    "the guide finished early": (early, "guide 1 missing"),
    "the guide's prompt is cut": (
        lambda own: [(family("a", own), [5] * 40)], "the base has written 1 tokens.*guide 1 has written 0"
    ),
    "the guide's prompt is cut, and the base writes one token": (
        lambda own: [(family("a", own, 1), [6] * 40)], "the base missing"
    ),
    "no tokens are left in the step": (
        lambda own: [(family(str(n), own), [5 + n] * size) for n, size in enumerate((20, 21))], "guide 1 missing"
    ),
    "no place is left": (lambda own: [(family(str(n), own), [5 + n]) for n in range(4)], "guide 1 missing"),
    "memory runs out, and the newest request is preempted": (
        lambda own: [
            (ordinary("short"), [7] * 18), (ordinary("long"), [8] * 33), (ordinary("one"), [9]),
            (family("a", own), [5, 6]), (family("b", own), [5, 7]),
        ],
        "guide 1 missing",
    ),
    "a family is preempted, and too long to come back in one step": (
        lambda own: [(family(str(n), own, 50), [5 + n] * 6) for n in range(3)],
        "the base has written 28 tokens.*guide 1 has written 27 tokens",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", APART)
def test_a_family_that_comes_apart_is_an_error(llm, folders, case):
    families, message = APART[case]
    own = guides(folders)[0]
    with pytest.raises(RuntimeError, match=f"can't be guided in this step: .*{message}"):
        submit(llm, families(own))
    # The engine goes on, if it is in this process.
    assert texts(guided_generate(llm, prompts()[:1], own, greedy())) == parm_texts(folders)[:1]


def test_what_the_engine_refuses(llm, folder, folders):
    own = guides(folders)[0]
    request = family("a", own)[0]
    request.params.extra_args["guidance_strengths"] = [0.0]
    with pytest.raises(vllm.exceptions.VLLMValidationError, match="guidance_strengths"):
        submit(llm, [([request], [5])])
    loras = [LoRARequest(f"{n}", n, own.loras[0].lora_path) for n in (1, 2, 3, 4)]
    with pytest.raises(ValueError, match="the last slot"):
        guided_generate(llm, [[5]] * 4, [Guidance(lora) for lora in loras])
    with pytest.raises(ValueError, match="LogitsProcessor"):
        settings = {**SETTINGS, "logits_processors": ["trl_parm.serving:CoupledLogitsProcessorV2"]}
        vllm.LLM(str(folder / "base"), **settings)


ALONE = "can't be guided in this step: guide 1 missing"


def in_own_process(folder):
    """Runs the offline and the asynchronous engine in processes of their own, as they are by default."""
    folders = [folder / "arm" / name for name in json.loads((folder / "names.json").read_text())]
    llm = vllm.LLM(str(folder / "base"), **SETTINGS)
    offline = texts(guided_generate(llm, prompts(), guides(folders), greedy()))
    del llm
    streamed, left, died = asyncio.run(with_async_engine(folder, folders))
    (folder / "found.json").write_text(json.dumps([offline, streamed, left, died]))


async def with_async_engine(folder, folders):
    engine = vllm.AsyncLLMEngine.from_engine_args(vllm.AsyncEngineArgs(model=str(folder / "base"), **SETTINGS))
    guided = AsyncGuidance(engine)

    async def read(prompt, own, steps=None):
        outputs = guided.generate(prompt, greedy(), own)
        text = []
        async for output in outputs:
            text = list(output.outputs[0].token_ids)
            if steps and len(text) >= steps:
                break
        await outputs.aclose()
        return text

    asked = list(zip(prompts(), guides(folders)))
    streamed = await asyncio.gather(*(read(*of_one) for of_one in asked))
    left = await asyncio.gather(*(read(*of_one, steps=2 if i % 2 else None) for i, of_one in enumerate(asked)))
    try:
        alone = family("alone", asked[0][1])[0]
        async for _ in engine.generate(tokens_input([5, 6]), alone.params, "alone"):
            pass
    except Exception as error:
        died = type(error).__name__
    else:
        died = "unguided text"
    engine.shutdown()
    return streamed, left, died


@pytest.mark.slow
def test_engines_in_their_own_process(folder, folders):
    (folder / "names.json").write_text(json.dumps([path.name for path in folders]))
    code = f"import test_vllm; test_vllm.in_own_process(test_vllm.Path({str(folder)!r}))"
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", f"if __name__ == '__main__':\n    {code}"], env=environment,
        cwd=Path(__file__).parent, capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    offline, streamed, left, died = json.loads((folder / "found.json").read_text())
    expected = parm_texts(folders)
    assert offline == expected
    assert streamed == expected
    assert all(text == other[: len(text)] for text, other in zip(left, expected))
    assert left[::2] == expected[::2]
    assert died == "EngineDeadError"
    assert ALONE in ran.stdout + ran.stderr
