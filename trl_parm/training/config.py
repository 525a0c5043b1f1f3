# SPDX-License-Identifier: Apache-2.0
"""What a training is given: arguments of [`PreferenceARMTrainer`], and model, adapter and data from YAML."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeGuard, cast

import torch
from datasets import Dataset, IterableDataset, load_dataset
from datasets.exceptions import DatasetGenerationError
from peft import LoraConfig, PeftConfig
from pyarrow import ArrowInvalid
from transformers import BitsAndBytesConfig
from transformers.trainer_utils import HubStrategy
from transformers.utils import is_torch_bf16_gpu_available
from trl import ModelConfig, get_quantization_config
from trl.trainer.base_config import _BaseConfig

from peft_pblora import MoSLoraConfig, PBLoraConfig, SVDLoraConfig
from peft_pblora.card import PROMPT
from trl_parm.arguments import check_fields
from trl_parm.preference_text import check_template

from .losses import ARMLoss
from .metrics import is_better_larger


ALONE = ""
"""The name of a data set that was given without one."""
FILE_KINDS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
ADAPTERS = {"pblora": PBLoraConfig, "svdlora": SVDLoraConfig, "moslora": MoSLoraConfig, "lora": LoraConfig}
CHOICES = {
    "loss_type": ("sigmoid", "hinge"),
    "aggregation": ("sum", "tchebycheff"),
    "preference_per": ("step", "pair"),
    "truncation_mode": ("filter", "cut_prompt"),
}
A_BETA = "a positive number, or a mapping from each objective to one"
A_PREFERENCE = "a vector such as [1, 0], or a mapping such as {'helpful': 1, 'harmless': 0} with a weight by objective"


@dataclass
class PreferenceARMConfig(_BaseConfig):
    """Training arguments of an autoregressive reward model, beside all of `transformers.TrainingArguments`.

    Where a default differs from `TrainingArguments` it is the one of TRL's trainers (`logging_steps=10`,
    `gradient_checkpointing=True`, bf16 where the device has it and fp16 is not set) or of the authors' PARM script,
    as said below.

    Args:
        beta (`float` or `dict[str, float]`, *optional*, defaults to 0.01):
            β_i of the pair loss, positive; one for all objectives or one by name. The default is the one of PARM's
            safety task (arXiv 2505.06274).
        loss_type (`str`, *optional*, defaults to `"sigmoid"`): `"sigmoid"`, or `"hinge"`.
        label_smoothing (`float`, *optional*, defaults to 0.0): Probability in [0, 0.5) that a label is wrong.
        target_margin (`float`, *optional*, defaults to 0.0): γ, subtracted from the argument of the loss.
        length_normalized (`bool`, *optional*, defaults to `False`):
            Compare mean instead of summed log-probabilities. Guidance adds up sums, so the papers do not.
        aggregation (`str`, *optional*, defaults to `"sum"`):
            `"sum"` for Σ_i α_i l_i, or `"tchebycheff"` for max_i α_i |l_i − z*_i| (Panacea, arXiv 2402.02030).
            With gradient accumulation the maximum costs one more forward of each micro-batch.
        ideal_losses (`dict[str, float]`, *optional*): z*_i by objective, for `"tchebycheff"` alone; 0 if not given.
        global_weight (`float`, *optional*, defaults to 0.0):
            λ of UniARM's global term, in our reading of arXiv 2602.09538; see [`losses.global_loss`].
        concentration (`float`, *optional*, defaults to 0.5):
            Dirichlet parameter of the preferences in training, positive, one for all objectives (PARM's safety task:
            0.5).
        preference_per (`str`, *optional*, defaults to `"step"`):
            One preference for a whole optimisation step, as the papers do, or one for each `"pair"`: the same expected
            gradient at the same cost.
        preference_template (`str`, *optional*):
            A text with `{preference}` in it: α is written into the start of each prompt, for a model *without* a
            preference-conditioned adapter, such as a plain LoRA; see [`PreferenceText`]. A baseline.
        train_preferences (`list`, *optional*):
            What to draw from instead with equal chances, each a vector of shape `(k,)` or a mapping with a weight for
            each objective, also as JSON: one entry trains at a fixed preference, one that is there twice is drawn
            twice as often.
        eval_preferences (`list`, *optional*):
            Preferences to evaluate at, given likewise. The vertices and the uniform vector if not given.
        label_columns (`dict[str, str]`, *optional*):
            Objective → column of a labelled data set (`response_0`, `response_1`) that says which response is better.
            A column named like the objective if not given.
        max_length (`int`, *optional*, defaults to 1024):
            Most tokens of prompt and response together; `None` for any. The model's number of positions, where it has
            one, is a limit too.
        truncation_mode (`str`, *optional*, defaults to `"filter"`):
            What becomes of longer pairs: `"filter"` leaves them out, `"cut_prompt"` cuts the start of their prompt. A
            response is never cut, since summed log-probabilities would favour the cut one.
        append_end_token (`bool`, *optional*, defaults to `False`):
            Append the end token to responses that have none, as those of some chat templates. It is always appended to
            plain texts.
        weight_column (`str`, *optional*):
            The column with a number from 0 to 1e30 that each pair counts for: l_i is the weighted mean over pairs, so
            that only ratios matter. Every data set needs it then.
        share_prompt (`bool`, *optional*, defaults to `False`):
            Feed prompt, first and second response as one row, for models with `sdpa` or `eager` attention. With one
            preference for a step, rows hold several pairs without padding, and the start that all prompts have in
            common, such as a chat template's, is read once in a row.
        pad_to_multiple_of (`int`, *optional*): Round batch lengths up.
        dataset_num_proc (`int`, *optional*): Processes that tokenize.
        disable_dropout (`bool`, *optional*, defaults to `True`):
            Set all dropout of the model given to 0, as TRL does for DPO, and that of functions too. A model that is
            random nevertheless is refused at its first step.
        activation_offloading (`bool`, *optional*, defaults to `False`): Keep activations in CPU memory.
        model_init_kwargs (`dict`, *optional*): For `from_pretrained` where the trainer gets a model id.
        optimize_for_cpu (`bool`, *optional*, defaults to `True`):
            Where the trainer gets a model id and computes on a CPU, pack the model's weights: products are in bfloat16
            on a CPU with units for it, unless `model_init_kwargs` has `dtype: float32`; adapter and optimizer stay in
            float32. One that FSDP or ZeRO 3 will shard stays as it is. For a model that is loaded already call
            [`trl_parm.optimize_for_cpu`].
        trust_remote_code (`bool`, *optional*, defaults to `False`): Passed on to `from_pretrained`.
        card_prompt (`str`, *optional*):
            A prompt that the base model answers at several preferences when the model is saved, for the model card;
            it has a default. `None` for no answers.
        hub_strategy (`str`, *optional*, defaults to `"end"`):
            As in transformers. While it trains, the others upload pickles too: arguments, optimizer states.
        greater_is_better (`bool`, *optional*):
            Of `metric_for_best_model`. If not given, losses, errors and the correlation of vertices are better when
            smaller, all else when larger.
        learning_rate (`float`, *optional*, defaults to 5e-4): As in PARM and GenARM.

    Raises:
        ValueError: a value of another type, out of its range, or that contradicts another.
    """

    _VALID_DICT_FIELDS = [*_BaseConfig._VALID_DICT_FIELDS, "model_init_kwargs", "label_columns", "ideal_losses"]

    learning_rate: float = 5e-4
    # The order of the types makes HfArgumentParser read a string, which is JSON here.
    beta: dict | str | float | None = 0.01
    loss_type: str = "sigmoid"
    label_smoothing: float = 0.0
    target_margin: float = 0.0
    length_normalized: bool = False
    aggregation: str = "sum"
    ideal_losses: dict | str | None = None
    global_weight: float = 0.0
    concentration: float = 0.5
    preference_per: str = "step"
    preference_template: str | None = None
    train_preferences: list[str] | None = None
    eval_preferences: list[str] | None = None
    label_columns: dict | str | None = None
    max_length: int | None = 1024
    truncation_mode: str = "filter"
    append_end_token: bool = False
    weight_column: str | None = None
    share_prompt: bool = False
    pad_to_multiple_of: int | None = None
    dataset_num_proc: int | None = None
    disable_dropout: bool = True
    activation_offloading: bool = False
    model_init_kwargs: dict | str | None = None
    optimize_for_cpu: bool = True
    trust_remote_code: bool = False
    hub_strategy: HubStrategy | str = "end"
    card_prompt: str | None = PROMPT

    def __post_init__(self) -> None:
        if self.bf16 is None and not self.fp16:
            # TRL's default of True is an error on a machine without a bf16 device, and slow on a CPU without units.
            self.bf16 = not self.use_cpu and is_torch_bf16_gpu_available()
        if self.greater_is_better is None and self.metric_for_best_model is not None:
            self.greater_is_better = is_better_larger(self.metric_for_best_model)
        mappings = ("label_columns", "ideal_losses", "model_init_kwargs")
        for name in mappings:  # which transformers reads, unless they are no JSON
            _from_json(f"`{name}`", getattr(self, name), "a mapping")
        super().__post_init__()
        self.beta = _from_json("`beta`", self.beta, A_BETA)
        for name in ("train_preferences", "eval_preferences"):
            setattr(self, name, _preferences(name, getattr(self, name)))
        self._check_types(mappings)
        betas = self.beta.values() if isinstance(self.beta, dict) else [self.beta]
        conditions = [
            (name, getattr(self, name) in allowed, f"it must be one of {', '.join(allowed)}")
            for name, allowed in CHOICES.items()
        ]
        conditions += [
            ("beta", all(_is_number(b) and b > 0 for b in betas), "every β must be positive"),
            ("label_smoothing", 0 <= self.label_smoothing < 0.5, "it must lie in [0, 0.5)"),
            ("global_weight", self.global_weight >= 0, "it must be 0 or larger"),
            ("concentration", self.concentration > 0, "it must be positive"),
            ("learning_rate", self.learning_rate > 0, "it must be positive"),
            ("label_smoothing_factor", not self.label_smoothing_factor, "the loss of pairs has `label_smoothing`"),
            (
                "neftune_noise_alpha",
                not (self.neftune_noise_alpha and self.disable_dropout),
                "such noise needs `disable_dropout=False`",
            ),
            (
                "ideal_losses",
                not self.ideal_losses or self.aggregation == "tchebycheff",
                "they are of `aggregation='tchebycheff'`. Set that, or leave them out",
            ),
            ("eval_preferences", self.eval_preferences != [], "it must name one. Leave it out for the vertices"),
            ("max_steps", self.max_steps == -1 or self.max_steps > 0, "it must be positive, or -1 for whole epochs"),
            ("num_train_epochs", self.num_train_epochs > 0 or self.max_steps > 0, "it must be positive"),
        ]
        self._check(conditions)
        if self.preference_template is not None:
            check_template(self.preference_template)
        if self.aggregation == "tchebycheff" and self.preference_per == "pair":
            raise ValueError(
                "`aggregation='tchebycheff'` takes the largest of the objectives' weighted losses, which needs one "
                "preference for all pairs of a step. Use `preference_per='step'`."
            )

    def _check_types(self, mappings: Sequence[str]) -> None:
        """Raises `ValueError` for arguments of another type than is annotated."""
        demands: dict[str, tuple[Callable[[Any], bool], str]] = {
            "bool": (lambda value: isinstance(value, bool), "it must be True or False"),
            "float": (_is_number, "it must be one finite number"),
            "int | None": (
                lambda value: value is None or (_is_number(value) and isinstance(value, Integral) and value > 0),
                "it must be a whole number, 1 or larger, or None",
            ),
        }
        conditions = [
            (name, demands[kind][0](getattr(self, name)), demands[kind][1])
            for name, kind in PreferenceARMConfig.__annotations__.items()
            if kind in demands
        ]
        values = [(name, getattr(self, name)) for name in mappings]
        conditions += [
            (name, value is None or isinstance(value, Mapping), "it must be a mapping") for name, value in values
        ]
        self._check(conditions)
        ideals = cast(dict, self.ideal_losses or {}).values()
        self._check([("ideal_losses", all(map(_is_number, ideals)), "each of them must be a finite number")])

    def _check(self, conditions: Iterable[tuple[str, bool, str]]) -> None:
        """Raises `ValueError` for the first argument whose condition does not hold, with what is demanded."""
        for name, holds, demand in conditions:
            if not holds:
                raise ValueError(f"`{name}` is {getattr(self, name)!r}, but {demand}.")

    def to_dict(self) -> dict[str, Any]:
        """As transformers', which takes whatever is called `..._token` for a secret."""
        return {**super().to_dict(), "append_end_token": self.append_end_token}

    def by_objective(self, name: str, objectives: list[str]) -> dict[str, float]:
        """The `beta` or `ideal_losses` of each objective. Raises `ValueError` for a mapping that names others."""
        value: Any = getattr(self, name)
        if not isinstance(value, dict):
            return dict.fromkeys(objectives, float(value or 0))
        if set(value) != set(objectives):
            raise ValueError(f"`{name}` names the objectives {sorted(value)}, but they are {sorted(objectives)}.")
        return {objective: float(value[objective]) for objective in objectives}

    def arm_loss(self, objectives: list[str]) -> ARMLoss:
        """The loss that these arguments ask for. Raises `ValueError` as [`by_objective`] does."""
        return ARMLoss(
            torch.tensor(list(self.by_objective("beta", objectives).values())),
            torch.tensor(list(self.by_objective("ideal_losses", objectives).values())),
            self.target_margin,
            self.label_smoothing,
            hinge=self.loss_type == "hinge",
            by_maximum=self.aggregation == "tchebycheff",
            global_weight=self.global_weight,
        )


@dataclass
class PairData:
    """One data set of preference pairs.

    Args:
        path (`str`): A JSON, CSV or Parquet file, a folder, or an id on the Hub. In CSV only an empty cell is missing.
        objective (`str`, *optional*): Its objective; not given for a data set with labels for several.
        name (`str`, *optional*): Configuration of a data set on the Hub.
        split (`str`, *optional*):
            The split, slices such as `train[:1000]` included. If not given, `train`; of a folder or an id for
            evaluation `test`.
        streaming (`bool`, *optional*, defaults to `False`): Read it as a stream.
        columns (`dict[str, str]`, *optional*): Its column → the column that is expected, which it replaces.
        where (`dict[str, Any]`, *optional*): Keep the rows with these values in these columns.
    """

    path: str
    objective: str | None = None
    name: str | None = None
    split: str | None = None
    streaming: bool = False
    columns: dict[str, str] | None = None
    where: dict[str, Any] | None = None

    def load(self, split: str = "train") -> Dataset | IterableDataset:
        """Loads the pairs, of a folder or an id those of a `split` where the data set names none.

        Raises `ValueError` if the file is missing, empty or damaged, or the split or columns are missing.
        """
        kind = FILE_KINDS.get(Path(self.path).suffix)
        if not Path(self.path).name:
            raise ValueError(f"The data is at {self.path!r}, which names none. Give a file, or a folder or id.")
        if kind and not Path(self.path).exists():
            raise ValueError(f"There is no data at {self.path!r}. Give an existing file, or an id on the Hub.")
        source: dict[str, Any] = {"path": kind, "data_files": self.path} if kind else {"path": self.path}
        source |= {"name": self.name, "split": self.split or ("train" if kind else split)}
        if kind == "csv":  # texts such as NA and None stay texts
            source |= {"keep_default_na": False, "na_values": [""]}
        try:
            data: Any = load_dataset(**source, streaming=cast(Any, self.streaming))
            if kind and self.streaming and next(iter(data), None) is None:
                raise ValueError("it has no row")
            if kind and not self.streaming:
                data.data.table.validate(full=True)  # that texts are UTF-8, which is else seen row by row
        except (DatasetGenerationError, StopIteration, TypeError, ValueError) as error:
            if str(error).startswith(("Unknown split", "Bad split")):
                raise ValueError(f"{str(error).rstrip('.')}. Name one of {self.path!r} as its `split`.") from error
            if not kind:
                raise
            raise ValueError(_damage(Path(self.path), kind, error.__cause__ or error)) from error
        wanted = {*(self.columns or {}), *(self.where or {})}
        if data.column_names and not wanted <= set(data.column_names):
            raise ValueError(
                f"The data at {self.path!r} lacks the columns {sorted(wanted - set(data.column_names))}; it has "
                f"{sorted(data.column_names)}."
            )
        if self.where:
            conditions = self.where.items()
            data = data.filter(lambda row: all(row[column] == value for column, value in conditions))
        if not self.columns:
            return data
        replaced = set(data.column_names or ()) & set(self.columns.values()) - set(self.columns)
        return (data.remove_columns(sorted(replaced)) if replaced else data).rename_columns(self.columns)


@dataclass
class ARMArguments:
    """Model, adapter and data of a training run.

    Args:
        model_name_or_path (`str`): The ARM's backbone.
        train_data (`list[PairData]`): The data sets, each in YAML as a path or a mapping; see [`PairData`].
        eval_data (`list[PairData]`, *optional*): The same for evaluation.
        objectives (`list[str]`, *optional*): Names and order of the objectives; those of the data if not given.
        adapter (`str`, *optional*, defaults to `"pblora"`): `"pblora"`, `"svdlora"`, `"moslora"` or `"lora"`.
        adapter_kwargs (`dict`, *optional*): Further arguments of its configuration, such as `{r1: 4, r2: 4}`.
        target_modules (`list[str]`, *optional*): The modules to adapt; chosen by architecture if not given.
        load_in_4bit (`bool`, *optional*, defaults to `False`): Quantize the backbone with bitsandbytes (QLoRA).
        resume (`bool`, *optional*, defaults to `False`): Go on from the last complete checkpoint.
    """

    model_name_or_path: str
    train_data: list[PairData] = field(default_factory=list)
    eval_data: list[PairData] = field(default_factory=list)
    objectives: list[str] | None = None
    adapter: str = "pblora"
    adapter_kwargs: dict | str | None = None
    target_modules: list[str] | None = None
    load_in_4bit: bool = False
    resume: bool = False

    def __post_init__(self) -> None:
        self.adapter_kwargs = _from_json("`adapter_kwargs`", self.adapter_kwargs, "a mapping")
        if not isinstance(self.adapter_kwargs, Mapping | None):
            raise ValueError(f"`adapter_kwargs` is {self.adapter_kwargs!r}, but it must be a mapping.")
        self.train_data = [as_pair_data(entry) for entry in self.train_data]
        self.eval_data = [as_pair_data(entry) for entry in self.eval_data]
        if self.adapter not in ADAPTERS:
            raise ValueError(f"`adapter` is {self.adapter!r}, but it must be one of {', '.join(ADAPTERS)}.")

    def load(self, data: list[PairData], split: str = "train") -> dict[str, Dataset | IterableDataset] | None:
        """The data sets by objective, those without one under names of their own; `None` if there is none."""
        unnamed = [ALONE] if len(data) == 1 else [f"pairs_{i}" for i in range(len(data))]
        loaded = {entry.objective or name: entry.load(split) for entry, name in zip(data, unnamed)}
        if len(loaded) < len(data):
            raise ValueError("Two data sets have the same objective. Join them into one file or data set first.")
        return loaded or None

    def peft_config(self, label_columns: dict[str, str] | None) -> PeftConfig:
        """The adapter's configuration, for the objectives given, or those of the data."""
        settings: dict[str, Any] = {"target_modules": self.target_modules, "task_type": "CAUSAL_LM"}
        if self.adapter != "lora":
            named = [entry.objective for entry in self.train_data if entry.objective]
            settings["objectives"] = self.objectives or list(dict.fromkeys([*(label_columns or {}), *named]))
        kind = ADAPTERS[self.adapter]
        given = check_fields(cast(dict, self.adapter_kwargs or {}), kind, "`adapter_kwargs`")
        if unknown := set(given) - {field.name for field in fields(kind)}:
            raise ValueError(f"`adapter_kwargs` has {', '.join(unknown)}, which {kind.__name__} does not know.")
        return kind(**{**settings, **given})

    def quantization_config(self) -> BitsAndBytesConfig | None:
        """For a backbone in 4 bits (NF4, double quantization, computing in bfloat16)."""
        return get_quantization_config(
            ModelConfig(load_in_4bit=self.load_in_4bit, use_bnb_nested_quant=True, dtype="bfloat16")
        )


def called(name: str) -> str:
    """How an error calls a data set."""
    return "data set" if name == ALONE else f"data set {name!r}"


def _damage(path: Path, kind: str, error: BaseException) -> str:
    """What is wrong with a file that can't be loaded, and what to do."""
    if not path.read_bytes().strip():
        return f"The data at {str(path)!r} is empty. Give it at least one pair."
    line = _bad_line(path) if kind == "json" else None
    return line or f"The data at {str(path)!r} can't be read: {error}. Give a whole {kind} file."


def _bad_line(path: Path) -> str | None:
    """Which line of a file of JSON lines is none, if any."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            text = line.decode(errors="replace").strip().removeprefix("\ufeff")
            if text and not (_is_object(text) and _is_text(line)):
                kind = "JSON object" if _is_text(line) else "text in UTF-8"
                return f"Line {number} of {str(path)!r} is no {kind}: {text[:80]!r}. Mend or remove it."
    return None


def _is_text(line: bytes) -> bool:
    try:
        return bool(line.decode())
    except UnicodeDecodeError:
        return False


@contextmanager
def with_lines(entries: Iterable[PairData]) -> Iterator[None]:
    """Names the line of a file that a stream can't read to its end: pyarrow counts rows from anywhere in it."""
    try:
        yield
    except ValueError as error:
        files = (Path(entry.path) for entry in entries)
        files = (file for file in files if FILE_KINDS.get(file.suffix) == "json" and file.is_file())
        broken = any(isinstance(e, ArrowInvalid | UnicodeDecodeError) for e in (error, error.__cause__))
        line = broken and next(filter(None, map(_bad_line, files)), None)
        if line:
            raise ValueError(line) from error
        raise


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _from_json(what: str, value: Any, allowed: str) -> Any:
    """What a text in JSON stands for; other values stay. Raises `ValueError` for a text that is none."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError:
        raise ValueError(f"{what} is {value!r}, but it must be {allowed}, or that in JSON.") from None


def _preferences(name: str, given: Any) -> list[Any] | None:
    """The entries of a list of preferences; a single one stands for a list of one. Raises `ValueError` for others."""
    if given is None:
        return None
    given = _plain(f"`{name}`", given, "a list of preferences")
    alone = not isinstance(given, list | tuple) or (given and all(map(_is_number, given)))
    entries = [_plain(f"An entry of `{name}`", entry, A_PREFERENCE) for entry in ([given] if alone else given)]
    for entry in entries:
        if not isinstance(entry, Mapping | list | tuple):
            raise ValueError(f"An entry of `{name}` is {entry!r}, but it must be {A_PREFERENCE}.")
    return entries


def _plain(what: str, value: Any, allowed: str) -> Any:
    """As [`_from_json`], of a tensor or an array its numbers."""
    return value.tolist() if hasattr(value, "tolist") else _from_json(what, value, allowed)


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def as_pair_data(entry: PairData | Mapping[str, Any] | str) -> PairData:
    """A data set as it stands in YAML: a path, or a mapping. Raises `ValueError` for a mapping of another kind."""
    if isinstance(entry, PairData):
        return entry
    try:
        settings = {"path": entry} if isinstance(entry, str) else entry
        return PairData(**check_fields(settings, PairData, "A data set"))
    except TypeError:
        others = [name for name in PairData.__dataclass_fields__ if name != "path"]
        raise ValueError(
            f"A data set is given as {entry}, but it needs `path`, and may have {', '.join(others)}."
        ) from None
