"""The keys of a recipe of `htsr finetune`: what each means, its default, and what it may be."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from htsr.calibration.record_forms import NAMES, Names
from htsr.calibration.records import Source
from htsr.errors import UsageError
from htsr.finetuning.rates import measures_by_epoch, policy_of, require_effect
from htsr.finetuning.recipe_values import kind_of, nearest
from htsr.training.lora import HILL
from htsr.training.lora_targets import ALL_LINEAR
from htsr.training.lowrank.gum import Base, Reweight
from htsr.training.lowrank.rounding import Rounding
from htsr.training.lowrank.scaling import ScaledBy
from htsr.training.memory.plan import FrozenWeights
from htsr.training.sampling.members import Unit
from htsr.training.sampling.probabilities import Strategy
from htsr.training.sampling.sampler import Embedding
from htsr.training.sampling.states import FrozenState

Method = Literal["full", "lora", "qlora", "lisa", "owlore", "galore", "apollo", "gum"]
LayerwisePolicy = Literal["none", "ends", "llr", "tempbalance", "alphadecay"]


SECTIONS_OF: Mapping[str, tuple[str, ...]] = {
    "full": (),
    "lora": ("lora", "sampling"),
    "qlora": ("lora", "sampling"),
    "lisa": ("sampling",),
    "owlore": ("sampling", "low_rank"),
    "galore": ("low_rank",),
    "apollo": ("low_rank",),
    "gum": ("low_rank", "gum"),
}
USUAL_RATE = 2e-5  # SFTConfig's own, for whole matrices
LARGEST_RANK = 1 << 16  # of a matrix in a model that there is: its smaller side is far below
ADAPTER_RATE = 2e-4  # that of the guides of PEFT and TRL; adapters begin at ΔW = 0 and have far to go


def needed_by(method: str) -> tuple[str, ...]:
    """The sections that a recipe of `method` has whether it names them or not.

    Examples:
        >>> from htsr.finetuning.recipe import SECTIONS_OF, needed_by
        >>> SECTIONS_OF["lora"], needed_by("lora")
        (('lora', 'sampling'), ('lora',))
    """
    sections = SECTIONS_OF.get(method, ())
    return tuple(section for section in sections if not (section == "sampling" and "lora" in sections))


def _at_least(section: str, least: int, **values: int | None) -> None:
    for name, value in values.items():
        if value is not None and value < least:
            raise UsageError(f"{section}{name} is {value}; it is at least {least}")


def _between(section: str, low: float, high: float, *, closed: bool = False, **values: float) -> None:
    """Insist on numbers between `low` and `high`, the lower end counted where `closed`."""
    for name, value in values.items():
        if not (low <= value if closed else low < value) or not value < high:
            bounds = f"{'at least' if closed else 'above'} {low:g}" + (
                f" and below {high:g}" if high < math.inf else ""
            )
            raise UsageError(f"{section}{name} is {value}; it is {bounds}{' and finite' * (high == math.inf)}")


@dataclass(frozen=True, kw_only=True)
class Data:
    """What the model is trained and tested on; each source is one of `htsr.calibration.records.read_records`.

    Attributes:
        train: source of the training records, with ``text``, ``prompt`` and ``completion``, chat ``messages``,
            ShareGPT's ``conversations``, Alpaca's ``instruction`` and ``output``, or ``question``, ``choices`` and
            ``answer``; or a list of sources. Each may be a section with ``source``, ``weight``, ``text_field`` and
            ``columns``.
        evaluation: source of records for the evaluation loss, or a list of them.
        evaluation_share: share of the training records that is held out where there is no `evaluation`; 0 for none.
            None is 0.05, and where training is `streaming` none: `evaluation_records` are held out there.
        evaluation_records: number of first records of each source that are held out where training is `streaming`.
        multiple_choice: source of questions whose accuracy is measured before and after.
        limit: largest number of training records, drawn by the seed.
        text_field: field that holds the text of each record.
        columns: our names of the records' fields by the names that they have; null for a field that is left out.
        streaming: whether training records are read while it goes on, again and again, in an order that is shuffled
            a thousand at a time: for what is larger than memory. Needs max_steps.

    Raises:
        UsageError: a number is out of its range, keys do not go together, or a name is none of ours.
    """

    train: str | Source | tuple[str | Source, ...]
    evaluation: str | Source | tuple[str | Source, ...] | None = None
    evaluation_share: float | None = None
    evaluation_records: int | None = None
    multiple_choice: str | None = None
    limit: int | None = None
    text_field: str | None = None
    columns: Mapping[str, str | None] = field(default_factory=dict)
    streaming: bool = False

    def __post_init__(self) -> None:
        _at_least("data.", 1, limit=self.limit, evaluation_records=self.evaluation_records)
        if self.evaluation_share is None and not self.streaming:
            object.__setattr__(self, "evaluation_share", 0.05)
        _between("data.", 0, 1, closed=True, evaluation_share=self.evaluation_share or 0.0)
        if self.streaming and self.evaluation_share:
            raise UsageError(
                "data.evaluation_share has no meaning with streaming: true, where evaluation_records are held out"
            )
        for key in ("train", "evaluation", "multiple_choice"):
            if getattr(self, key) in ((), ""):
                raise UsageError(f"data.{key} is empty")
        if any(source.weight is not None for source in self.sources("evaluation")):
            raise UsageError("data.evaluation: weight is for training; all records of evaluation are taken once")
        _check_names(self.text_field, self.columns)
        for source in (*self.sources("train"), *self.sources("evaluation")):
            _check_names(source.text_field, source.columns)
        if not self.streaming and self.evaluation_records is not None:
            raise UsageError("data.evaluation_records is for streaming: true; evaluation_share holds out records else")
        if self.streaming and self.limit is not None:
            raise UsageError("data.limit has no meaning with streaming: true, which ends after training.max_steps")
        if self.streaming and self.evaluation is not None and self.evaluation_records is not None:
            raise UsageError("data.evaluation_records has no meaning beside data.evaluation: leave one of them out")
        weighted = [source for source in self.sources("train") if source.weight is not None]
        if self.streaming and len(self.sources("train")) > 1 and not weighted:
            raise UsageError("data.streaming never comes to the end of a source: give several of them a weight each")

    def sources(self, key: Literal["train", "evaluation"]) -> tuple[Source, ...]:
        """The sources of training or evaluation.

        Args:
            key: which of them.
        """
        given = getattr(self, key)
        several = given if isinstance(given, tuple) else () if given is None else (given,)
        return tuple(Source(source=one) if isinstance(one, str) else one for one in several)

    def names(self, source: Source) -> Names:
        """What the fields of the records of a `source` are called."""
        if source.text_field is None and not source.columns:
            return Names(self.text_field, self.columns)
        return Names(source.text_field, source.columns)


def _check_names(text_field: str | None, columns: Mapping[str, Any]) -> None:
    if text_field is not None and columns:
        raise UsageError("data.text_field and data.columns: where the text is named no other field is read; leave one")
    for theirs, ours in columns.items():
        if ours is not None and ours not in NAMES:
            raise UsageError(f"data.columns: {theirs} is to be {kind_of(ours)}{nearest(ours, NAMES)}")
        if ours is not None and list(columns.values()).count(ours) > 1:
            raise UsageError(f"data.columns: two fields are to be {ours}")


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Which blocks train, see `LayerSampler`.

    Attributes:
        strategy: strategy of the draws; None is the method's own: ``owlore`` for owlore, ``uniform`` for the others.
        unit: what is drawn: a ``block``, or a ``matrix`` of a block, as in MISA, whose strategy is ``gradient_norm``.
        active: number γ of blocks that train at a time, or of blocks whose parameters the drawn matrices have.
        interval: number K of optimizer steps between draws.
        top: whether the γ most probable blocks train for good.
        embedding: what becomes of embedding and head, see `LayerSampler`; ``lowrank`` is for owlore, and under lora and
            qlora it is of those that ``lora.modules_to_save`` has.
        frozen_state: what becomes of the optimizer state of a frozen block, see `LayerSampler`.
        threshold: τ of the outlier distribution.
        outliers: file from `htsr outliers`; without it outliers are measured on the training data.
        calibration_samples: number of training records on which they are measured.

    Raises:
        UsageError: a number is out of its range, or two keys do not go together.
    """

    strategy: Strategy | None = None
    unit: Unit = "block"
    active: int = 2
    interval: int = 50
    top: bool = False
    embedding: Embedding = "freeze"
    frozen_state: FrozenState = "drop"
    threshold: float = 13.0
    outliers: str | None = None
    calibration_samples: int = 64

    def __post_init__(self) -> None:
        _at_least(
            "sampling.", 1, active=self.active, interval=self.interval, calibration_samples=self.calibration_samples
        )
        _between("sampling.", 0, math.inf, threshold=self.threshold)
        if self.unit == "matrix" and self.embedding == "sampled":
            raise UsageError("sampling.embedding: sampled is a member beside blocks: take sampling.unit: block")
        if self.strategy == "gradient_norm" and self.top:
            raise UsageError("sampling.top takes the most probable for good, and those of gradient_norm change")


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """Low-rank optimizer state, see `LowRankAdamW`.

    Attributes:
        rank: dimension r of the subspace of every low-rank matrix. None is 128; under apollo 256, and 1 where it is
            scaled by ``tensor``.
        scale: factor of the low-rank updates. None is 1, and √128 where they are scaled by ``tensor``.
        refresh_every: optimizer steps from one projector to the next, T in the paper.
        method: method of the projector. None is ``randomized``, and under apollo ``random``.
        scaled_by: what has a learning rate of its own under apollo: each ``channel`` (APOLLO, what None is there), or
            the ``tensor`` (APOLLO-Mini).
        moments: what becomes of the moments at a refresh.
        state_dtype: dtype of the moments.
        embedding: what becomes of embedding and head where no blocks are sampled: ``train`` them in full rank, as
            published; train them at low rank, too, ``lowrank``; or ``freeze`` them.
        gradients: what becomes of gradients. ``project`` and ``update`` keep no full gradient of a low-rank matrix, in
            one process; ``update`` has one backward a step and no clipping. The gradient norm that ``project`` clips is
            that in the subspaces. apollo needs whole gradients, and has no ``project``.
    """

    rank: int | None = None
    scale: float | None = None
    refresh_every: int = 200
    method: Literal["randomized", "svd", "random"] | None = None
    scaled_by: ScaledBy | None = None
    moments: Literal["keep", "rotate"] = "keep"
    state_dtype: Literal["float32", "bfloat16", "8bit"] = "float32"
    embedding: Literal["train", "lowrank", "freeze"] = "train"
    gradients: Literal["keep", "project", "update"] = "keep"

    def __post_init__(self) -> None:
        _at_least("low_rank.", 1, rank=self.rank, refresh_every=self.refresh_every)
        if self.scale is not None:
            _between("low_rank.", 0, math.inf, scale=self.scale)

    def filled(self, method: Method) -> LowRank:
        """With what None stands for under a recipe's `method`.

        Raises:
            UsageError: a key has no meaning for the method.

        Examples:
            >>> from htsr.finetuning.recipe import LowRank
            >>> mini = LowRank(scaled_by="tensor").filled("apollo")
            >>> mini.rank, round(mini.scale, 2), mini.method
            (1, 11.31, 'random')
        """
        scaled = method == "apollo"
        by = self.scaled_by or ("channel" if scaled else None)
        if by is not None and not scaled:
            raise UsageError(f"low_rank.scaled_by is for the method apollo, not for {method}")
        if self.method == "random" and (not scaled or self.moments == "rotate"):
            wrong = "moments: rotate" if scaled else f"the method {method}"
            raise UsageError(f"low_rank.method: random is for the method apollo with moments: keep, not for {wrong}")
        if scaled and self.gradients == "project":
            raise UsageError(
                "low_rank.gradients: project drops the whole gradients, which apollo scales: take keep or update"
            )
        if scaled and self.moments == "rotate" and self.method is None:
            raise UsageError(
                "low_rank.moments: rotate has no meaning under a random projection: take low_rank.method: svd"
            )
        return replace(
            self,
            rank=self.rank or {None: 128, "channel": 256, "tensor": 1}[by],
            scale=self.scale if self.scale is not None else 128**0.5 if by == "tensor" else 1.0,
            method=self.method or ("random" if scaled else "randomized"),
            scaled_by=by,
        )


@dataclass(frozen=True, kw_only=True)
class Gum:
    """Which blocks train outside of their subspaces now, see `GUM`; they are drawn anew with each subspace.

    Attributes:
        active: number γ of blocks in each draw; of matrices as many as γ blocks have, which may be larger ones: memory
            is planned for the largest.
        unit: what is drawn: a ``block`` with all of its matrices, or each ``matrix`` for itself.
        base: what trains the matrices of the blocks.
        reweight: what is divided by the probability of being drawn, or of not being drawn.
        strategy: what the weights of the blocks in the draws follow, as in `Sampling`.
        threshold: τ of the outlier distribution.
        outliers: file from `htsr outliers`; without it outliers are measured on the training data.
        calibration_samples: number of training records on which they are measured.

    Raises:
        UsageError: a number is out of its range, or the strategy has no meaning here.
    """

    active: int = 2
    unit: Unit = "block"
    base: Base = "adamw"
    reweight: Reweight = "gradient"
    strategy: Strategy = "uniform"
    threshold: float = 13.0
    outliers: str | None = None
    calibration_samples: int = 64

    def __post_init__(self) -> None:
        _at_least("gum.", 1, active=self.active, calibration_samples=self.calibration_samples)
        _between("gum.", 0, math.inf, threshold=self.threshold)
        if self.strategy == "gradient_norm":
            raise UsageError("gum.strategy: gradient_norm is for the methods with the section sampling")


@dataclass(frozen=True, kw_only=True)
class Lora:
    """LoRA, by default on all linear layers of the blocks; with qlora over weights in 4 bits.

    Attributes:
        rank: rank of each adapter; with `score` their average by parameters.
        targets: which modules are adapted: ``all-linear``, or one or several of names (``q_proj``), roles (``attn.*``)
            and, where it is one text, a regular expression of whole names.
        modules_to_save: names or roles of modules that train whole beside the adapters, as embedding and head
            (``embed``, ``head``). Where the model ties these two, they stay one tensor.
        scaling: lora_alpha/r.
        dropout: dropout probability of the adapters' input.
        score: score that the ranks follow, ``hill`` or a metric of the model's analysis, see `htsr.lora_config`; None
            for equal ranks.
        calibration_samples: number of training records on which a start is measured that asks for data: eva, corda,
            lora_ga.
        merge: whether the folder of the result holds the model with the adapters merged into it, and the adapter alone
            under ``adapter``; else it holds the adapter, which names the model,
            for PEFT to load (``AutoPeftModelForCausalLM``).
        options: any other argument of PEFT's ``LoraConfig``: use_rslora, use_dora, init_lora_weights …

    Raises:
        UsageError: a number is out of its range, or there is no such metric.
    """

    rank: int = 8
    targets: str | tuple[str, ...] = ALL_LINEAR
    modules_to_save: tuple[str, ...] = ()
    scaling: float = 2.0
    dropout: float = 0.0
    score: str | None = None
    calibration_samples: int = 64
    merge: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        from htsr.spectra.metrics import NUMERIC

        _at_least("lora.", 1, rank=self.rank, calibration_samples=self.calibration_samples)
        if self.rank > LARGEST_RANK:
            raise UsageError(
                f"lora.rank is {kind_of(self.rank)}; no matrix of any model has one above {LARGEST_RANK:,}"
            )
        _between("lora.", 0, math.inf, scaling=self.scaling)
        _between("lora.", 0, 1, closed=True, dropout=self.dropout)
        if self.score not in (None, HILL, *NUMERIC):
            raise UsageError(f"lora.score: rows have no metric {self.score!r}; hill, stable_rank and entropy are usual")


@dataclass(frozen=True, kw_only=True)
class EarlyStopping:
    """When training stops before its last step; the model that is saved is then the best.

    Attributes:
        patience: number of evaluations one after the other without an improvement after which training stops.
        threshold: smallest improvement of the evaluation loss that counts, in nats per token.
    """

    patience: int = 3
    threshold: float = 0.0

    def __post_init__(self) -> None:
        _at_least("early_stopping.", 1, patience=self.patience)
        _between("early_stopping.", 0, math.inf, closed=True, threshold=self.threshold)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A fine-tuning run.

    Attributes:
        model: folder, hub id, .gguf file, or ``package:MODULE/PATH``.
        output: folder of the result; ``~`` is the user's own.
        data: see `Data`.
        method: ``full``, ``lora``, ``qlora`` (LoRA over weights in 4 bits), ``lisa``, ``owlore``, ``galore``,
            ``apollo`` or ``gum``.
        layerwise: policy of `htsr.layerwise`, or ``none``: a name; fields of `htsr.Policy` with other values than those
            of ``llr``, or of the policy that the key ``policy`` names, as in ``{score: null, embeddings: 5}``; or
            multipliers by pattern, which are what adapters take: LoRA+ is ``{"*.lora_B": 16}``.
        revision: branch, tag or commit of a hub id.
        model_options: how transformers makes the model: attn_implementation, any attribute of its configuration
            (rope_parameters, attention_dropout …), trust_remote_code.
        dtype: dtype of the weights; ``auto`` is the one in which they are stored.
        rounding: what becomes of that part of a trained weight which bfloat16 or float16 cannot hold, see
            `LowRankAdamW`; without effect on weights that train in float32, such as adapters. None is ``stochastic``,
            and the rounding of the optimizer that ``training.optim`` names. Under methods without low_rank
            ``nearest`` is transformers' optimizer, and with another rounding the optimizer is htsr's AdamW, with
            moments in bfloat16.
        frozen_weights: where the weights of blocks live that do not train now: on the ``device``; or in memory of the
            ``host`` or on ``disk``, in the checkpoint's files in their own dtype, from which they are streamed through
            two buffers (`htsr.stream_frozen`), in one process.
        seed: seed of everything random.
        spectra: whether the model is analyzed before and after.
        sampling: section of lisa and owlore, and of lora and qlora where adapters are sampled by block.
        low_rank: section of owlore, galore, apollo and gum.
        gum: section of gum.
        lora: section of lora and qlora.
        early_stopping: when training stops for want of improvement, see `EarlyStopping`; None for never. To keep the
            best model without it, ``training.load_best_model_at_end``. With both evaluations come with the checkpoints
            where ``training`` says nothing else.
        training: any argument of TRL's ``SFTConfig``: learning_rate, max_steps, max_length, packing, report_to …
            Without a learning_rate it is 2e-4 for lora and qlora, and 2e-5 for the others.

    Raises:
        UsageError: a section or a layerwise policy has no meaning for the method or would change nothing, or a number
            is out of its range.

    Examples:
        The method brings its sections along, with their defaults:

        >>> from htsr.finetuning.recipe import Data, Recipe
        >>> recipe = Recipe(model="org/name", output="out", data=Data(train="train.jsonl"), method="galore")
        >>> recipe.low_rank.rank, recipe.sampling, recipe.training
        (128, None, {'learning_rate': 2e-05})
    """

    model: str
    output: str
    data: Data
    method: Method = "lora"
    layerwise: Mapping[str, Any] | LayerwisePolicy = "none"
    revision: str | None = None
    model_options: Mapping[str, Any] = field(default_factory=dict)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    rounding: Rounding | None = None
    frozen_weights: FrozenWeights = "device"
    seed: int = 0
    spectra: bool = True
    sampling: Sampling | None = None
    low_rank: LowRank | None = None
    gum: Gum | None = None
    lora: Lora | None = None
    early_stopping: EarlyStopping | None = None
    training: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        wanted = SECTIONS_OF[self.method]
        for section, make in (("sampling", Sampling), ("low_rank", LowRank), ("gum", Gum), ("lora", Lora)):
            if getattr(self, section) is not None and section not in wanted:
                raise UsageError(f"the section {section} has no meaning for the method {self.method}")
            if getattr(self, section) is None and section in needed_by(self.method):
                object.__setattr__(self, section, make())
        if self.low_rank is not None:
            object.__setattr__(self, "low_rank", self.low_rank.filled(self.method))
        rate = ADAPTER_RATE if "lora" in wanted else USUAL_RATE
        object.__setattr__(self, "training", {"learning_rate": rate, **self.training})
        _between("", 0, 2**32, closed=True, seed=self.seed)
        for name in ("model", "output"):
            if not getattr(self, name).strip() or "\0" in getattr(self, name):
                raise UsageError(f"{name} is empty")
        # transformers expands its own copy, and a run has one folder
        object.__setattr__(self, "output", os.path.expanduser(self.output))
        by_spectra = self.strategy in ("alpha", "erg", "snr")
        if not self.spectra and (by_spectra or (self.lora is not None and self.lora.score is not None)):
            section = "gum" if self.gum else "sampling"
            what = f"{section}.strategy {self.strategy}" if by_spectra else "lora.score"
            raise UsageError(f"{what} needs spectra: true")
        if self.frozen_weights != "device" and (self.sampling is None or self.method == "qlora"):
            which = "lora with the section sampling, lisa and owlore"
            raise UsageError(f"frozen_weights: {self.frozen_weights} is for blocks that are sampled, by {which}")
        if self.lora is not None and not self.lora.merge:
            if self.model.endswith(".gguf"):
                raise UsageError("lora.merge: an adapter of a .gguf file could not be loaded again, so it is merged")
            if changed := sorted({*self.model_options} - {"attn_implementation", "trust_remote_code"}):
                raise UsageError(
                    f"lora.merge: an adapter cannot keep model_options.{changed[0]}, which a merged model has in its "
                    "configuration: leave one of the two out"
                )
        if self.early_stopping is not None and self.training.get("load_best_model_at_end") is False:
            raise UsageError("early_stopping saves the best model: leave training.load_best_model_at_end out")
        if self.gum is not None and self.low_rank is not None and self.low_rank.moments != "keep":
            raise UsageError("low_rank.moments has no meaning for the method gum: they begin anew with each subspace")
        if self.frozen_weights != "device" and self.sampling is not None and self.sampling.unit == "matrix":
            raise UsageError(
                f"frozen_weights: {self.frozen_weights} streams blocks, and sampling.unit: matrix trains parts of all"
            )
        by_gradients = self.sampling is not None and self.sampling.strategy == "gradient_norm"
        if by_gradients and self.low_rank is not None and self.low_rank.gradients != "keep":
            raise UsageError(
                "sampling.strategy: gradient_norm draws by gradients, which low_rank.gradients: "
                f"{self.low_rank.gradients} drops: take keep"
            )
        compiles = sorted(key for key in self.training if key.startswith("torch_compile") and self.training[key])
        if self.frozen_weights != "device" and compiles:
            raise UsageError(
                f"frozen_weights: {self.frozen_weights} moves weights, which compiled code does not see: leave "
                f"training.{compiles[0]} out"
            )
        if self.data.streaming and not self.training.get("max_steps", -1) > 0:
            raise UsageError("data.streaming: the end of a stream is not known; set training.max_steps")
        if self.data.streaming and measures_by_epoch(self.layerwise):
            raise UsageError("layerwise: tempbalance measures once an epoch, of which data.streaming knows none")
        if self.sampling is not None and self.low_rank is None and self.embedding == "lowrank":
            raise UsageError(f"sampling.embedding: lowrank is for the method owlore, and {self.method} has no low rank")
        if self.sampling is not None and self.embedding != "freeze" and self.lora and not self.lora.modules_to_save:
            raise UsageError(
                f"sampling.embedding: {self.embedding} has no meaning for the method {self.method}, where embedding "
                "and head train only where lora.modules_to_save has them"
            )
        if self.sampling is not None and self.low_rank is not None and self.low_rank.embedding != "train":
            raise UsageError("low_rank.embedding is for methods that train all blocks; here it is sampling.embedding")
        self._check_layerwise()
        for key in ("optim", "optim_args"):
            if self.low_rank is not None and key in self.training:
                raise UsageError(
                    f"training.{key} has no meaning for the method {self.method}, whose optimizer is htsr's"
                )
            if self.rounding not in (None, "nearest") and key in self.training:
                raise UsageError(
                    f"rounding: {self.rounding} is for htsr's AdamW, and training.{key} asks for another optimizer: "
                    "leave one of them out"
                )

    def _check_layerwise(self) -> None:
        policy = policy_of(self.layerwise)
        if policy is None:
            return
        frozen_by = None
        if self.lora is not None:
            frozen_by = None if self.lora.modules_to_save else "lora.modules_to_save"
        elif self.embedding == "freeze":
            frozen_by = f"{'low_rank' if self.sampling is None else 'sampling'}.embedding"
        require_effect(
            self.layerwise,
            policy,
            method=self.method,
            adapters=self.lora is not None,
            frozen_by=frozen_by,
            decays=any(self.training.get(key) for key in ("weight_decay", "optim_args", "deepspeed")),
        )
        if self.low_rank is not None and self.low_rank.gradients == "update":
            raise UsageError("low_rank.gradients: update steps before layerwise can set a rate; take project or keep")
        narrow = self.low_rank is not None and (policy.spectrum == "momentum" or self.low_rank.gradients == "project")
        if policy.spectrum != "weights" and narrow:
            raise UsageError(f"layerwise.spectrum: {policy.spectrum} of low-rank matrices are in their subspace only")

    @property
    def draws(self) -> Sampling | Gum | None:
        """The section that says how blocks are drawn."""
        return self.sampling or self.gum

    @property
    def strategy(self) -> Strategy | None:
        """The strategy of the draws, or what None stands for; None where nothing is drawn."""
        default: Strategy = "owlore" if self.method == "owlore" else "uniform"
        return (self.draws.strategy or default) if self.draws else None

    @property
    def embedding(self) -> str:
        """What becomes of embedding and head where blocks are sampled or states are at low rank; else ``train``."""
        section = self.sampling or self.low_rank
        return section.embedding if section is not None else "train"

    @property
    def rounds(self) -> Rounding:
        """The rounding of narrow weights that train: `rounding`, or what None stands for."""
        return self.rounding or ("nearest" if "optim" in self.training else "stochastic")
