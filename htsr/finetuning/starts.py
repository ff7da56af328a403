"""How adapters begin: PEFT's starts from weights (PiSSA, OLoRA, LoftQ) and from data (EVA, CorDA, LoRA-GA).

All but EVA begin at ΔW = s·B₀A₀ ≠ 0 and take it out of the weights, so that the model is as it was. What training needs
again after a kill, A₀ and B₀, is made once, by PEFT on the first process, and kept in a file of the output folder; from
it every process, also that which has made it, takes out the same. In the end the merged model is what has trained,
W − s·B₀A₀ + s·BA; and the adapter is written for the weights W as they are: [A; A₀] and [B, −B₀], of twice the rank.

LoftQ fits what 4 bits have lost, and is taken out when the adapters are merged into the weights as they are stored.

PEFT's own conversion (``path_initial_model_for_weight_conversion``) gives the same A and B; it drops DoRA's magnitudes
and modules that train whole, refuses rsLoRA with ranks by score, and wants the model unsharded.

Source: PiSSA (arXiv 2404.02948), OLoRA (2406.01775), LoftQ (2310.08659), EVA (2410.07170), CorDA (2406.05223), LoRA-GA
(2407.05000), all as PEFT has them; what data-driven starts are measured on is ours: the first training records, their
loss tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from htsr.calibration.loading import load_model
from htsr.calibration.record_forms import Record
from htsr.errors import HtsrError, MissingDependencyError, SourceError, UsageError, reason_of
from htsr.files import written
from htsr.finetuning.placing import how_loaded
from htsr.finetuning.tokens import Tokens, bounds, tokenized

if TYPE_CHECKING:
    import torch

    from htsr.finetuning.recipe import Lora, Recipe

START = "adapter_start.safetensors"
OF_STARTS = ("init_lora_weights", "eva_config", "corda_config", "lora_ga_config")  # options of `LoraConfig`
_NAME = "default"  # PEFT's, of the only adapter
_ASK_DATA = ("eva", "corda", "lora_ga")
_PASSES = 100  # over the data, after which EVA's directions will not settle


def start_of(lora: Lora | None) -> str | None:
    """The start of new adapters that is more than a draw: pissa, olora, eva, corda, lora_ga, loftq; None for others.

    Args:
        lora: section of the recipe; None where there are no adapters.
    """
    wanted = None if lora is None else lora.options.get("init_lora_weights", True)
    return wanted if isinstance(wanted, str) and wanted not in ("gaussian", "orthogonal", "mica") else None


def changes_weights(start: str | None) -> bool:
    """Whether a `start` of adapters is taken out of the weights, in which else it would count twice."""
    return start is not None and start != "eva"


def with_configs(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of ``LoraConfig`` with the configurations inside them made of their keys.

    Args:
        options: options as the recipe has them.
    """
    from peft.tuners.lora.config import CordaConfig, EvaConfig, LoraGAConfig

    kinds: dict[str, Any] = {"eva_config": EvaConfig, "corda_config": CordaConfig, "lora_ga_config": LoraGAConfig}
    return {
        key: kinds[key](**value) if key in kinds and isinstance(value, Mapping) else value
        for key, value in options.items()
    }


@dataclass(frozen=True)
class Start:
    """Adapters as training begins.

    Attributes:
        tensors: A₀ (r, inputs) and B₀ (outputs, r) by PEFT's names, float32, in host memory.
        targets: names of the adapted modules.
        ranks: ranks that are not the usual one, by name.
        alphas: lora_alpha that is not the usual one, by name.
    """

    tensors: Mapping[str, torch.Tensor]
    targets: tuple[str, ...]
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]

    def save(self, path: Path) -> None:
        """Write it to the file `path`, whole or not at all."""
        from safetensors.torch import save_file

        words = {"targets": self.targets, "ranks": self.ranks, "alphas": self.alphas}
        with written(path) as temporary:
            save_file(dict(self.tensors), temporary, {key: json.dumps(value) for key, value in words.items()})

    @staticmethod
    def load(path: Path) -> Start:
        """Read it from the file `path`.

        Raises:
            SourceError: it cannot be read.
        """
        from safetensors import safe_open

        try:
            with safe_open(path, framework="pt") as file:
                words = {key: json.loads(value) for key, value in file.metadata().items()}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
            return Start(tensors, tuple(words["targets"]), words["ranks"], words["alphas"])
        except Exception as error:  # of safetensors, JSON and the system
            raise SourceError(f"{path} cannot be read: {reason_of(error, path)}") from error


def made_start(
    recipe: Recipe, model: torch.nn.Module, config: Any, tokenizer: Any, train: Iterable[Record], arguments: Any
) -> Start:
    """The start of adapters, made by PEFT where the model lies; the model stays as it is.

    Args:
        recipe: recipe, of which model, seed and lora are read.
        model: model without adapters.
        config: PEFT's ``LoraConfig`` of the adapters.
        tokenizer: tokenizer of the model.
        train: training records, of which data-driven starts take the first.
        arguments: arguments of TRL.

    Raises:
        UsageError: the adapters cannot begin so, of this model or with these data.
    """
    import torch
    from peft import EvaConfig, get_peft_model

    assert recipe.lora is not None
    start = start_of(recipe.lora)
    assert start is not None
    config = copy(config)
    config.modules_to_save, config.use_dora, config.init_lora_weights = None, False, True
    if hasattr(config, "ensure_weight_tying"):
        config.ensure_weight_tying = False  # of what is saved whole, which has no start
    nested = with_configs(recipe.lora.options)
    samples: list[Tokens] = []
    if start in _ASK_DATA:
        first = islice(train, recipe.lora.calibration_samples)
        samples = [t.between(*bounds(len(t.ids), arguments)) for t in tokenized(first, tokenizer, arguments)]
        samples = [sample for sample in samples if any(sample.labels)]
    with torch.random.fork_rng(), _blamed(start):
        torch.manual_seed(recipe.seed)
        if start in ("corda", "lora_ga"):
            _measure(model, config, start, nested, samples)
        if start == "eva":
            config.init_lora_weights, config.eva_config = start, nested.get("eva_config") or EvaConfig()
        adapted: Any = get_peft_model(model, config)  # type: ignore[arg-type]
        if start == "eva":
            _begin_by_eva(adapted, samples, int(tokenizer.pad_token_id or 0))
        elif start == "loftq":
            _begin_by_loftq(adapted, recipe)
        else:
            _begin_layers(adapted, config, start, nested)
    found = _as_start(adapted)
    adapted.unload()
    return found


def begun(model: torch.nn.Module, config: Any, start: Start, *, changed: bool) -> Any:
    """The model with adapters that begin as `start` says.

    Args:
        model: model without adapters; its weights change where `changed`.
        config: PEFT's ``LoraConfig`` of the adapters.
        start: how they begin.
        changed: whether s·B₀A₀ is taken out of the weights.
    """
    from peft import get_peft_model

    config = copy(config)
    config.init_lora_weights, config.target_modules = True, {*start.targets}
    config.base_model_name_or_path = None  # PEFT takes it from the model, and warns where it was another
    config.rank_pattern, config.alpha_pattern = dict(start.ranks), dict(start.alphas)
    adapted: Any = get_peft_model(model, config)  # type: ignore[arg-type]
    for name, layer in _layers(adapted).items():
        for part in ("lora_A", "lora_B"):
            own = getattr(layer, part)[_NAME].weight
            own.data.copy_(start.tensors[f"base_model.model.{name}.{part}.weight"])
        if changed:
            weight = layer.get_base_layer().weight
            weight.data = (weight.data.float() - layer.get_delta_weight(_NAME).float()).to(weight.dtype)
        if config.use_dora:  # magnitudes are the norms of the weights with B₀A₀ in them
            layer.lora_variant[_NAME].init(layer, adapter_name=_NAME, config=config)
    return adapted


def for_stored_weights(
    trained: Mapping[str, torch.Tensor], start: Start, config: Any
) -> tuple[dict[str, torch.Tensor], Any]:
    """An adapter of the weights as they are stored, and its configuration, from one of the weights without the start.

    ΔW = s·(BA − B₀A₀) has twice the rank; whatever else is in the adapter stays: DoRA's magnitudes, modules that were
    trained whole.

    Args:
        trained: tensors of the trained adapter by PEFT's names, A (r, inputs) and B (outputs, r) among them.
        start: how it began.
        config: its ``LoraConfig``.

    Returns:
        The tensors, A (2r, inputs) and B (outputs, 2r), and the configuration.
    """
    import torch

    both = dict(trained)
    for name, first in start.tensors.items():
        own = trained[name]
        is_a = ".lora_A." in name
        both[name] = torch.cat([own, (first if is_a else -first).to(own.dtype)], dim=0 if is_a else 1)
    config = copy(config)
    alpha = 2**0.5 if config.use_rslora else 2  # lora_alpha over √rank or rank stays
    config.r, config.lora_alpha = 2 * config.r, alpha * config.lora_alpha
    config.rank_pattern = {name: 2 * rank for name, rank in config.rank_pattern.items()}
    config.alpha_pattern = {name: alpha * value for name, value in config.alpha_pattern.items()}
    return both, config


def _as_start(adapted: Any) -> Start:
    from peft import get_peft_model_state_dict

    layers, config = _layers(adapted), adapted.peft_config[_NAME]
    for name, layer in layers.items():
        a, b = layer.lora_A[_NAME].weight, layer.lora_B[_NAME].weight
        rank = layer.r[_NAME]
        if a.shape != (rank, layer.in_features) or b.shape != (layer.out_features, rank):
            raise UsageError(f"lora: {name} cannot begin so with rank {rank}, or not as PEFT has it; take a lower rank")
    tensors = {
        name: tensor.detach().float().cpu().contiguous()
        for name, tensor in get_peft_model_state_dict(adapted, save_embedding_layers=False).items()
    }
    return Start(tensors, tuple(layers), dict(config.rank_pattern), dict(config.alpha_pattern))


def _layers(adapted: Any) -> dict[str, Any]:
    """Adapted layers by the name of their module in the model without adapters."""
    return {
        name.removeprefix("base_model.model."): module
        for name, module in adapted.named_modules()
        if hasattr(module, "lora_A") and _NAME in module.lora_A
    }


def _begin_layers(adapted: Any, config: Any, start: str, nested: Mapping[str, Any]) -> None:
    """Have PEFT begin each layer by itself, and give it its weights back: no copy of the model is needed."""
    from peft import LoraGAConfig

    config = copy(config)
    config.init_lora_weights, config.lora_ga_config = start, nested.get("lora_ga_config") or LoraGAConfig()
    for layer in _layers(adapted).values():
        weight = layer.get_base_layer().weight
        kept = weight.data.clone()
        layer.update_layer(_NAME, r=layer.r[_NAME], lora_alpha=layer.lora_alpha[_NAME], config=config)
        weight.data = kept


def _measure(
    model: torch.nn.Module, config: Any, start: str, nested: Mapping[str, Any], samples: Sequence[Tokens]
) -> None:
    """Have PEFT measure activations (CorDA) or gradients (LoRA-GA), which it leaves on the modules."""
    import torch
    from peft import LoraGAConfig, get_peft_model
    from peft.tuners.lora.config import CordaConfig

    wide = get_peft_model(model, copy(config))  # type: ignore[arg-type]
    config = copy(config)
    config.target_modules, config.init_lora_weights = {*_layers(wide)}, start
    wide.unload()
    device = next(model.parameters()).device
    if not samples:
        raise UsageError("no training record has a label")

    def run() -> None:
        for sample in samples:
            ids = torch.tensor([sample.ids], device=device)
            labels = torch.where(torch.tensor([sample.labels], device=device), ids, -100)
            loss = model(input_ids=ids, labels=labels).loss
            if start == "lora_ga":
                loss.backward()

    if start == "corda":
        from peft.tuners.lora.corda import preprocess_corda  # which wants attrs

        config.corda_config = nested.get("corda_config") or CordaConfig()
        preprocess_corda(model, config, run)
    else:
        from peft.tuners.lora.loraga import preprocess_loraga

        config.lora_ga_config = nested.get("lora_ga_config") or LoraGAConfig()
        preprocess_loraga(model, config, run)


def _begin_by_eva(adapted: Any, samples: Sequence[Tokens], padding: int) -> None:
    from peft import initialize_lora_eva_weights

    config = adapted.peft_config[_NAME]
    most = max(round(layer.r[_NAME] * config.eva_config.rho) for layer in _layers(adapted).values())
    batches = list(_batches(samples, most, padding))
    passes = 0

    def forward(model: Any, inputs: Mapping[str, Any]) -> None:
        nonlocal passes
        passes += 1
        if passes > _PASSES * len(batches) + 1:
            raise UsageError(f"its directions do not settle in {_PASSES} passes over the data; take more records")
        model(**inputs)

    initialize_lora_eva_weights(
        adapted, batches, forward_fn=forward, gather_distributed_inputs=False, show_progress_bar=False
    )


def _begin_by_loftq(adapted: Any, recipe: Recipe) -> None:
    """Give the adapters the best approximation of what 4 bits have lost of the weights: s·BA ≈ W − Q.

    PEFT's own (``replace_lora_weights_loftq``) wants CUDA, and leaves s out.
    """
    import torch
    from bitsandbytes.functional import dequantize_4bit

    whole: Any = load_model(recipe.model, revision=recipe.revision, **how_loaded(recipe) | {"four_bit": False})
    for name, layer in _layers(adapted).items():
        packed, rank = layer.get_base_layer().weight, layer.r[_NAME]
        kept = dequantize_4bit(packed.data, packed.quant_state)
        stored: Any = whole.get_submodule(name).weight
        lost = stored.data.to(kept.device).float() - kept.float()
        u, values, v = torch.linalg.svd(lost, full_matrices=False)
        root = (values[:rank] / layer.scaling[_NAME]).sqrt()
        layer.lora_A[_NAME].weight.data = root[:, None] * v[:rank]
        layer.lora_B[_NAME].weight.data = u[:, :rank] * root


def _batches(samples: Sequence[Tokens], least: int, padding: int) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of samples with at least so many labels each, without which PEFT passes a batch over, for ever."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    groups: list[list[Tokens]] = [[]]
    for sample in samples:
        if sum(sum(one.labels) for one in groups[-1]) >= least:
            groups.append([])
        groups[-1].append(sample)
    if len(groups) > 1 and sum(sum(one.labels) for one in groups[-1]) < least:
        last = groups.pop()
        groups[-1] += last
    count = sum(sum(one.labels) for one in groups[0])
    if count < least:
        raise UsageError(f"{least} labels are wanted at a time, and the training records have {count}; take more")
    for group in groups:
        ids = pad_sequence([torch.tensor(one.ids) for one in group], batch_first=True, padding_value=padding)
        real = pad_sequence([torch.ones(len(one.ids), dtype=torch.long) for one in group], batch_first=True)
        wanted = pad_sequence([torch.tensor(one.labels) for one in group], batch_first=True)
        yield {"input_ids": ids, "attention_mask": real, "labels": torch.where(wanted, ids, -100)}


@contextmanager
def _blamed(start: str) -> Iterator[None]:
    try:
        yield
    except HtsrError as error:
        raise UsageError(f"lora.options.init_lora_weights: {start}: {error}") from error
    except ImportError as error:
        raise MissingDependencyError(f"lora.options.init_lora_weights: {start}: {reason_of(error)}") from error
    except Exception as error:  # whatever PEFT raises of shapes, dtypes and data
        raise UsageError(f"lora.options.init_lora_weights: {start}: {reason_of(error)}") from error
