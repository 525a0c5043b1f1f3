# SPDX-License-Identifier: Apache-2.0
"""Every decoder, every mode of `generate`, and decoding by the formula in float64 without any cache."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from conftest import OBJECTIVES, character_tokenizer, tiny_arm, tiny_llama
from peft import LoraConfig, get_peft_model
from scipy.optimize import brentq, minimize_scalar
from transformers import (
    LlamaForSequenceClassification,
    LogitsProcessor,
    MistralConfig,
    MistralForCausalLM,
    RepetitionPenaltyLogitsProcessor,
)

from peft_pblora import set_preference
from peft_pblora.switch import backbone_of
from trl_parm import (
    BASE,
    LM,
    ClassifierReward,
    Guided,
    GuidedLogitsProcessor,
    Intersection,
    PreferenceText,
    Prompt,
    Scorer,
    Union,
)
from trl_parm.decoding import args, cage, genarm, mod, mod_w2s, parm, transfer_q


PROMPTS = torch.tensor([[0, 0, 5, 9, 33], [7, 8, 20, 41, 2], [0, 6, 6, 50, 11]])
MASK = (PROMPTS != 0).long()
ROWS = torch.tensor([[1.0, 0.0], [0.3, 0.7], [0.0, 1.0]])
BETAS = torch.tensor([0.5, 1.0, 2.0])
CHARACTERS, TEXT = character_tokenizer(), PreferenceText(OBJECTIVES)


def tiny_judge(**changes):
    """A random sequence classifier with two outputs."""
    config = tiny_llama(7, **changes).config
    config.num_labels = 2
    torch.manual_seed(7)
    return LlamaForSequenceClassification(config).eval()


def lora_model(*names: str, **changes):
    """A `PeftModel` of several LoRAs, whose B is not zero."""
    torch.manual_seed(5)
    settings = LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(tiny_llama(0, **changes), settings, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, settings)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


def tiny_mistral(seed: int = 1):
    """A random model whose attention has a window of four tokens."""
    torch.manual_seed(seed)
    config = MistralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2, sliding_window=4, pad_token_id=0, bos_token_id=None,
        eos_token_id=1,
    )  # fmt: skip
    return MistralForCausalLM(config).eval()


def log_probs(model, ids, preference=None, mask=None, **inputs):
    """log π of the next token from whole texts, in float64, by a copy of the model."""
    mask = torch.ones_like(ids) if mask is None else mask
    model = copy.deepcopy(model).double()
    if preference is not None:
        set_preference(model, preference)
    inputs = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0), **inputs}
    return _alone(model, False, input_ids=ids, **inputs)


def fed_tokens(model) -> list[int]:
    """The length of every forward of a model, from now on."""
    return _of_forwards(model, lambda ids: ids.shape[1])


def fed_rows(model) -> list[int]:
    """The rows of every forward of a model, from now on."""
    return _of_forwards(model, len)


def _of_forwards(model, measure: Callable[[torch.Tensor], int]) -> list[int]:
    found: list[int] = []
    decoder = backbone_of(model).get_decoder()
    decoder.register_forward_pre_hook(
        lambda m, args, kwargs: found.append(measure(args[0] if args else kwargs["input_ids"])), with_kwargs=True
    )
    return found


@dataclass
class Models:
    """The models of a test: the one that generates, an ARM, and small policies with their reference."""

    base: Any
    arm: Any
    first: Any
    second: Any
    reference: Any
    judge: Any = None

    @classmethod
    def make(cls, on_base: bool = False, **changes) -> Models:
        """On models of their own, or the ARM as an adapter on the base model."""
        small = [tiny_llama(seed, **changes) for seed in (0, 2, 3, 4)]
        # A policy that decodes on in Transfer-Q does not write pad tokens.
        small[1].lm_head.weight.data[0] = 0
        arm = tiny_arm(small[0] if on_base else tiny_llama(1, **changes))
        return cls(small[0], arm, *small[1:], tiny_judge(**changes))


@dataclass
class Decoder:
    """Its formula as a user writes it, and of log π_base and a function that gives log π of another model."""

    formula: Callable[[Models], Scorer]
    naive: Callable[[Models, torch.Tensor, Callable], torch.Tensor]
    rows: int | None = None
    has_arm: bool = False
    prompt: Callable[[dict[str, torch.Tensor]], Prompt] | None = None
    """What guides read in the place of the base model's prompts."""


def parm_of_rows(models, base, log_pi):
    """Each row at its own α and β: the rows of one preference at a time."""
    repeats = len(base) // 3
    guide = torch.stack(
        [log_pi(models.arm, ROWS[i // repeats])[i] / BETAS[i // repeats].double() for i in range(len(base))]
    )
    return base + guide


def of_each_row(base, weights):
    """A weight for each prompt as a column, for rows that `generate` repeats."""
    return weights.double().repeat_interleave(len(base) // 3)[:, None]


def genarm_of_rows(models, base, log_pi):
    strength = ROWS / BETAS[:, None]
    first, second = log_pi(models.first), log_pi(models.second)
    return base + of_each_row(base, strength[:, 0]) * first + of_each_row(base, strength[:, 1]) * second


def harmonic_of_rows(models, base, log_pi):
    helpful = of_each_row(base, ROWS[:, 0]) / log_pi(models.first).exp()
    return -(helpful + of_each_row(base, ROWS[:, 1]) / log_pi(models.second).exp()).log()


def harmonic(order):
    def formula(models, base, log_pi):
        mean = 0.3 * base.exp() ** -order + 0.7 * log_pi(models.first).exp() ** -order
        return -mean.log() / order

    return formula


def search(label_weights, k, rollout=0):
    """Every row and candidate on its own, whole texts without padding, decoded further with the policy `first`."""

    def formula(models, base, log_pi):
        result = torch.full_like(base, -torch.inf)
        for row, best in enumerate(base.topk(k).indices):
            prefix = log_pi.tokens[row][log_pi.mask[row].bool()]
            for candidate in best.tolist():
                text = [*prefix.tolist(), candidate]
                for _ in range(rollout):
                    if text[-1] == 1 and len(text) > len(prefix):
                        break
                    text.append(models.first(torch.tensor([text])).logits[0, -1].argmax().item())
                found = models.judge.score(models.judge.model(torch.tensor([text])).last_hidden_state)[0, -1]
                result[row, candidate] = base[row, candidate] + sum(w * found[i] for i, w in label_weights.items())
        return result

    return formula


def worst_of_two(models, base, log_pi):
    """GenARM row by row, at the weight at which SciPy finds that the decoder gains least."""
    first, second = 2 * log_pi(models.first), 2 * log_pi(models.second)
    rows = []
    for row in range(len(base)):

        def at(w, row=row):
            return base[row] + w * first[row] + (1 - w) * second[row]

        found = minimize_scalar(
            lambda w, at=at: torch.logsumexp(at(w), -1).item(),
            bounds=(0, 1),
            method="bounded",
            options={"xatol": 1e-9},
        )
        rows.append(min((at(w) for w in (0.0, found.x, 1.0)), key=lambda scores: torch.logsumexp(scores, -1)))
    return torch.stack(rows)


def game(preference, tau, k, rounds):
    """CAGE row by row: each principal's margin is the root that SciPy finds."""

    def formula(models, base, log_pi):
        result = torch.full_like(base, -torch.inf)
        off = log_pi(models.arm, off=True)
        rewards = [log_pi(models.arm, vertex) - off for vertex in ([1.0, 0.0], [0.0, 1.0])]
        for row in range(len(base)):
            α = preference if preference.ndim == 1 else preference[row // (len(base) // len(preference))]
            values, candidates = base[row].topk(k)
            q = [w * (r[row, candidates] - r[row, candidates].min()) for w, r in zip(α.double(), rewards)]
            paid = [torch.zeros(k, dtype=torch.float64) for _ in q]
            for _ in range(rounds):
                paid = [answer(values + (sum(paid) - paid[i]) / tau, q[i], tau) for i in range(2)]
            result[row, candidates] = values + sum(paid) / tau
        return result

    def answer(scores, q, tau):
        def gap(c):
            pi = torch.softmax(scores + (q - c).clamp(min=0) / tau, -1)
            return tau + (pi @ q.clamp(max=c)).item() - c

        return (q - brentq(gap, tau, tau + q.max().item() + 1e-9)).clamp(min=0)

    return formula


def reading(write):
    """log π of a model row by row, without padding, of prompts that are written anew: of their tokens and number."""

    def log_prob(model, log_pi):
        rows, repeats = [], len(log_pi.tokens) // log_pi.prompts
        for row, (tokens, mask) in enumerate(zip(log_pi.tokens, log_pi.mask, strict=True)):
            prompt = tokens[: log_pi.columns][mask[: log_pi.columns].bool()].tolist()
            text = [*write(prompt, row // repeats), *tokens[log_pi.columns :].tolist()]
            rows.append(_alone(model, False, input_ids=torch.tensor([text]))[0])
        return torch.stack(rows)

    return log_prob


def weights_before(α):
    """Writes the preference of a row before its prompt, character by character."""

    def write(prompt, number):
        helpful, harmless = α if isinstance(α, list) else α[number].tolist()
        text = f"helpful: {helpful:.2f}, harmless: {harmless:.2f}\n"
        return [*CHARACTERS.convert_tokens_to_ids([*text]), *prompt]

    return write


def with_start(inputs, start):
    """Prompts with tokens before them, padded on the left."""
    rows = [ids[mask.bool()].tolist() for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
    return CHARACTERS.pad({"input_ids": [[*start, *row] for row in rows]}, padding_side="left", return_tensors="pt")


DECODERS = {
    "PARM": Decoder(
        lambda m: parm(m.arm, [0.3, 0.7], beta=0.8),
        lambda m, base, log_pi: base + log_pi(m.arm, [0.3, 0.7]) / 0.8,
        has_arm=True,
    ),
    "PARM, α and β a row": Decoder(lambda m: parm(m.arm, ROWS, beta=BETAS), parm_of_rows, 3, has_arm=True),
    "GenARM": Decoder(
        lambda m: genarm({"helpful": m.first, "harmless": m.second}, [0.25, 0.75], beta=0.5),
        lambda m, base, log_pi: base + 0.5 * log_pi(m.first) + 1.5 * log_pi(m.second),
    ),
    "GenARM, α and β a row": Decoder(
        lambda m: genarm({"helpful": m.first, "harmless": m.second}, ROWS, beta=BETAS), genarm_of_rows, rows=3
    ),
    "MOD": Decoder(
        lambda m: mod({"helpful": BASE, "harmless": m.first, "funny": m.second}, [0.5, 0.2, 0.3]),
        lambda m, base, log_pi: 0.5 * base + 0.2 * log_pi(m.first) + 0.3 * log_pi(m.second),
    ),
    "MOD without the base": Decoder(
        lambda m: mod({"helpful": m.first, "harmless": m.second}, [0.4, 0.6]),
        lambda m, base, log_pi: 0.4 * log_pi(m.first) + 0.6 * log_pi(m.second),
    ),
    "MOD, forward KL": Decoder(
        lambda m: mod({"helpful": BASE, "harmless": m.first}, [0.3, 0.7], "forward_kl"), harmonic(1.0)
    ),
    "MOD, α-divergence": Decoder(
        lambda m: mod({"helpful": BASE, "harmless": m.first}, [0.3, 0.7], "alpha", order=0.5), harmonic(0.5)
    ),
    "MOD, forward KL, α a row": Decoder(
        lambda m: mod({"helpful": m.first, "harmless": m.second}, ROWS, "forward_kl"), harmonic_of_rows, rows=3
    ),
    "MOD-w2s": Decoder(
        lambda m: mod_w2s({"helpful": m.first, "harmless": m.second}, m.reference, {"helpful": 0.4, "harmless": 0.6}),
        lambda m, base, log_pi: (
            base
            + 0.4 * (log_pi(m.first) - log_pi(m.reference))
            + 0.6 * (log_pi(m.second) - log_pi(m.reference))
        ),
    ),
    "ARGS": Decoder(
        lambda m: args(
            {"a": ClassifierReward(m.judge), "b": ClassifierReward(m.judge, label=1)}, [0.25, 0.75], weight=2.0, k=4
        ),
        search({0: 0.5, 1: 1.5}, k=4),
    ),
    "Transfer-Q": Decoder(
        lambda m: transfer_q(m.judge, m.first, k=3, rollout_tokens=4), search({0: 1.0}, k=3, rollout=4)
    ),
    "a formula": Decoder(
        lambda m: BASE + 0.7 * LM(m.first) - 0.2 * LM(m.second),
        lambda m, base, log_pi: base + 0.7 * log_pi(m.first) - 0.2 * log_pi(m.second),
    ),
    "CAGE": Decoder(
        lambda m: cage(m.arm, [0.3, 0.7], tau=0.4, k=6, rounds=3),
        game(torch.tensor([0.3, 0.7]), 0.4, 6, 3),
        has_arm=True,
    ),
    "CAGE, α a row": Decoder(
        lambda m: cage(m.arm, ROWS, tau=0.4, k=6, rounds=3), game(ROWS, 0.4, 6, 3), 3, has_arm=True
    ),
    "PARM, off the simplex": Decoder(
        lambda m: parm(m.arm, [1.4, -0.5], beta=0.8, allow_off_simplex=True),
        lambda m, base, log_pi: base + log_pi(m.arm, [1.4, -0.5]) / 0.8,
        has_arm=True,
    ),
    "GenARM, off the simplex": Decoder(
        lambda m: genarm({"helpful": m.first, "harmless": m.second}, [1.4, -0.6], allow_off_simplex=True),
        lambda m, base, log_pi: base + 1.4 * log_pi(m.first) - 0.6 * log_pi(m.second),
    ),
    "GenARM, worst case": Decoder(
        lambda m: genarm({"helpful": m.first, "harmless": m.second}, "worst_case", beta=0.5), worst_of_two
    ),
    "a union and an intersection": Decoder(
        lambda m: BASE + 0.5 * Union(LM(m.first), LM(m.second)) - 0.3 * Intersection(BASE, LM(m.second)),
        lambda m, base, log_pi: (
            base
            + 0.5 * torch.maximum(log_pi(m.first), log_pi(m.second))
            - 0.3 * torch.minimum(base, log_pi(m.second))
        ),
    ),
    "PARM, α in the prompt": Decoder(
        lambda m: parm(m.first, beta=0.8),
        lambda m, base, log_pi: base + reading(weights_before([0.3, 0.7]))(m.first, log_pi) / 0.8,
        prompt=lambda inputs: Prompt.with_preference(inputs, [0.3, 0.7], TEXT, CHARACTERS),
    ),
    "PARM, α in the prompt, one a row": Decoder(
        lambda m: parm(m.first, beta=0.8),
        lambda m, base, log_pi: base + reading(weights_before(ROWS))(m.first, log_pi) / 0.8,
        rows=3,
        prompt=lambda inputs: Prompt.with_preference(inputs, ROWS, TEXT, CHARACTERS),
    ),
    "a contrast of two prompts of one model": Decoder(
        lambda m: 1.5 * LM(m.base) - 0.5 * BASE,
        lambda m, base, log_pi: 1.5 * reading(lambda prompt, number: [20, 21, *prompt])(m.base, log_pi) - 0.5 * base,
        prompt=lambda inputs: Prompt(inputs, guide=with_start(inputs, [20, 21])),
    ),
    "two preferences of one ARM and the untrained one": Decoder(
        lambda m: BASE + LM(m.arm, [1.0, 0.0]) + 0.5 * LM(m.arm, [0.2, 0.8]) - 0.7 * LM(m.arm, disable_adapter=True),
        lambda m, base, log_pi: (
            base + log_pi(m.arm, [1.0, 0.0]) + 0.5 * log_pi(m.arm, [0.2, 0.8]) - 0.7 * log_pi(m.arm, off=True)
        ),
        has_arm=True,
    ),
}  # fmt: skip

ONE_ROW = {"prompts": 1}
MODES = {
    "greedy": {},
    "one prompt": ONE_ROW,
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9},
    "several sequences": {"do_sample": True, "num_return_sequences": 3},
    "beam search": {"num_beams": 4},
    "beam sampling": {"num_beams": 3, "do_sample": True},
    "returned beams": {"num_beams": 4, "num_return_sequences": 2},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "chunked prefill": {"prefill_chunk_size": 2},
    "repetition penalty": {"repetition_penalty": 1.3},
    "prompt lookup": {**ONE_ROW, "prompt_lookup_num_tokens": 3},
    "assisted": {**ONE_ROW, "assistant": "small"},
    "assisted sampling": {**ONE_ROW, "assistant": "small", "do_sample": True},
    "assistant that is the base": {**ONE_ROW, "assistant": "base"},
    "assistant that is guided": {**ONE_ROW, "assistant": "guided"},
}
DOORS = ("model", "processor")


class NaiveProcessor(LogitsProcessor):
    """A decoder's formula from whole prefixes, in float64; the base model is read anew as well."""

    def __init__(self, decoder: Decoder, models: Models, mask: torch.Tensor) -> None:
        self.decoder, self.mask = decoder, mask
        self.models = copy.deepcopy(models)
        for model in vars(self.models).values():
            model.double()

    def __call__(self, input_ids, scores):
        mask = torch.ones_like(input_ids)
        mask[:, : self.mask.shape[1]] = self.mask.repeat_interleave(len(input_ids) // len(self.mask), dim=0)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)

        def log_pi(model, preference=None, off=False):
            if preference is not None:
                set_preference(model, preference, allow_off_simplex=True)
            return _alone(model, off, input_ids=input_ids, attention_mask=mask, position_ids=positions)

        # In float32 at the end, since a draw from a float64 tensor consumes other random numbers.
        log_pi.tokens, log_pi.mask = input_ids, mask
        log_pi.prompts, log_pi.columns = self.mask.shape
        with torch.no_grad():
            base = torch.log_softmax(scores.double(), -1)
            guided = self.decoder.naive(self.models, base, log_pi)
        return torch.log_softmax(guided.masked_fill(scores == -torch.inf, -torch.inf), -1).float()


def _alone(model, off, **inputs):
    """log π without any cache, and without the adapter if it is switched off."""
    taken = inspect_forward(model)
    inputs = {name: value for name, value in inputs.items() if name in taken}
    context = model.disable_adapter() if off else contextlib.nullcontext()
    with torch.no_grad(), context:
        return torch.log_softmax(model(**inputs, use_cache=False).logits[:, -1], -1)


def generate(models: Models, decoder: Decoder, door: str, prompts=3, assistant=None, **mode):
    """What a decoder writes by one of the doors, or by the naive formula."""
    settings = {"max_new_tokens": 10, "output_scores": True, "return_dict_in_generate": True, **mode}
    ids, mask = (PROMPTS[1:2], MASK[1:2]) if prompts == 1 else (PROMPTS, MASK)
    if assistant:
        found = {"small": models.reference, "base": models.base}
        settings["assistant_model"] = (
            found[assistant] if assistant in found else Guided(models.reference, decoder.formula(models))
        )
    inputs = {"input_ids": ids, "attention_mask": mask}
    own = None if decoder.prompt is None else decoder.prompt(inputs)
    processors: list[Any] = []
    if door == "model":
        model = Guided(models.base, decoder.formula(models))
        inputs |= {} if own is None else own.arguments
    elif door == "processor":
        model, processors = models.base, [GuidedLogitsProcessor(decoder.formula(models), prompt=own)]
    else:
        processors = [NaiveProcessor(decoder, models, mask)]
        model = Models.make().base  # without the ARM, which may lie on the other one
        if door == "naive model" and "repetition_penalty" in settings:
            processors.append(_repetition_penalty(settings.pop("repetition_penalty"), mask))
    torch.manual_seed(0)
    return model.generate(**inputs, logits_processor=processors, **settings)


def _repetition_penalty(penalty: float, mask: torch.Tensor) -> RepetitionPenaltyLogitsProcessor:
    """As `generate` makes it: where a release can't leave out padding, it counts as written."""
    try:
        return RepetitionPenaltyLogitsProcessor(penalty, prompt_ignore_length=cast(Any, (mask == 0).sum(1)))
    except ValueError:
        return RepetitionPenaltyLogitsProcessor(penalty)


def inspect_forward(model) -> set[str]:
    """The inputs that a model takes."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return set(inspect.signature(inner.forward).parameters)
