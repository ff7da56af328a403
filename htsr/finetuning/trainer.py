"""TRL's SFTTrainer with the optimizers of htsr."""

from __future__ import annotations

import logging
import time
import warnings
from contextlib import nullcontext
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_callback import PrinterCallback
from trl.trainer.sft_trainer import SFTTrainer

from htsr.finetuning.checkpoints import Checkpoint, LossSum, count_processes
from htsr.finetuning.memory import reset_peak
from htsr.finetuning.progress import LastLog, TrainingLines, Voice
from htsr.finetuning.rates import policy_of
from htsr.finetuning.stopping import EarlyStopping, KeptBest
from htsr.matrices.blocks import find_blocks
from htsr.matrices.modules import unwrapped
from htsr.training.callbacks import LayerSamplerCallback, LayerwiseCallback
from htsr.training.layerwise.wrapper import layerwise
from htsr.training.lowrank.groups import low_rank_groups
from htsr.training.lowrank.gum import GUM
from htsr.training.lowrank.gum_groups import gum_groups
from htsr.training.lowrank.optimizer import LowRankAdamW
from htsr.training.lowrank.rounding import NARROW, Rounding, share_lost

if TYPE_CHECKING:
    import torch

    from htsr.arrays import Vector
    from htsr.finetuning.recipe import Recipe
    from htsr.training.sampling.sampler import LayerSampler

logger = logging.getLogger(__name__)


class FinetuneTrainer(SFTTrainer):
    """SFTTrainer that makes the optimizer of a recipe: low-rank where its method is, with layerwise rates if wanted.

    Args:
        recipe: recipe, of which method, rounding, low_rank, layerwise and seed are read.
        sampler: sampler of the model's blocks, where they are sampled.
        weights: (L,) weights of the L blocks in the draws of gum; None for equal ones.
        checkpoint: checkpoint from which training will go on.
        voice: voice of the run, which tells the losses where it shows how far something is.
        arguments: arguments of SFTTrainer.

    Attributes:
        losses: sum of the training loss, over the pieces of an interrupted run.
        epoch_steps: number of optimizer steps of one epoch, known when training begins.
        rounding: how narrow weights are rounded, known when training begins; None where none train.
        began: when the first batch was trained, in seconds of `time.perf_counter`; None before.
    """

    def __init__(
        self,
        *,
        recipe: Recipe,
        sampler: LayerSampler | None = None,
        weights: Vector | None = None,
        checkpoint: Checkpoint | None = None,
        voice: Voice | None = None,
        **arguments: Any,
    ) -> None:
        self.recipe, self.sampler, self.weights, self.checkpoint = recipe, sampler, weights, checkpoint
        self.losses = LossSum(checkpoint, count_processes(arguments["args"]))
        self.epoch_steps: int | None = None
        self.rounding: Rounding | None = None
        self.began: float | None = None
        self.lines = TrainingLines(voice) if voice is not None and voice.show is not None else None
        callbacks: list[Any] = [self.losses, LastLog(), *([LayerSamplerCallback(sampler)] if sampler else [])]
        if arguments["args"].load_best_model_at_end:
            callbacks.append(KeptBest())
        if recipe.early_stopping is not None:
            callbacks.append(EarlyStopping(recipe.early_stopping.patience, recipe.early_stopping.threshold))
        super().__init__(callbacks=callbacks, **arguments)
        if recipe.method == "qlora":  # TRL has put adapters in bfloat16, where small updates are lost
            assert self.model is not None
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()
        if self.lines is not None:  # in place of transformers' bar and of all that it logs
            self.remove_callback(PrinterCallback if self.args.disable_tqdm else DEFAULT_PROGRESS_CALLBACK)
            self.add_callback(self.lines)
        if recipe.layerwise != "none":
            self.add_callback(LayerwiseCallback(self))

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, *others: Any, **more: Any
    ) -> Any:
        """TRL's tokens and labels, without packed sequences in which nothing has a label.

        TRL leaves out such records where they are not packed. A step of theirs would have the loss 0, which counts in
        the mean, and an update by momentum and decay alone.
        """
        found = super()._prepare_dataset(dataset, processing_class, args, packing, *others, **more)
        return found.filter(_has_label) if packing else found

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run forward and backward of one batch.

        Args:
            args: positional arguments of the Trainer's method.
            kwargs: keyword arguments of the Trainer's method.

        Returns:
            The loss, a scalar on the device.
        """
        if self.began is None:
            self.began = time.perf_counter()
            reset_peak()
        loss: torch.Tensor = super().training_step(*args, **kwargs)  # type: ignore[no-untyped-call]
        self.losses.add(loss)
        return loss

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run forward of one batch of held-out records.

        Args:
            args: positional arguments of the Trainer's method.
            kwargs: keyword arguments of the Trainer's method.

        Returns:
            What the Trainer's method returns: the loss first, a scalar on the device.
        """
        found = super().prediction_step(*args, **kwargs)
        if self.lines is not None and found[0] is not None:
            self.lines.add_evaluation(float(found[0]))
        return found

    def longest(self) -> int | None:
        """Number of tokens of the longest training record as it was prepared; None where it is not known."""
        import pyarrow.compute as pc

        table = getattr(self.train_dataset, "data", None)
        if table is None or "input_ids" not in table.column_names:
            return None
        longest: int | None = pc.max(pc.list_value_length(table.column("input_ids"))).as_py()
        return longest

    def set_initial_training_values(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's plan, with no epoch where the checkpoint is at its end: else one more step would be trained.

        Args:
            args: positional arguments of the Trainer's method.
            kwargs: keyword arguments of the Trainer's method.

        Returns:
            What the Trainer's method returns: the number of epochs first, the number of steps last.
        """
        _, self.epoch_steps, *others = plan = super().set_initial_training_values(*args, **kwargs)
        done = self.checkpoint is not None and (self.checkpoint.stopped or self.checkpoint.step >= plan[-1])
        return (0, self.epoch_steps, *others) if done else plan

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The optimizer over all trainable parameters; made before blocks are frozen.

        Args:
            model: model as the Trainer passes it: wrapped, or None for the Trainer's own.
        """
        if self.optimizer is not None:
            return self.optimizer
        inner: Any = self.model if model is None else model
        self.rounding = self._rounding(inner)
        if self.recipe.low_rank is not None:
            self.optimizer = self._low_rank_optimizer(inner)
        elif self.rounding not in (None, "nearest"):  # with the groups that the Trainer makes for its own
            self.optimizer_cls_and_kwargs = LowRankAdamW, self._options() | {"state_dtype": "bfloat16"}
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        if (policy := policy_of(self.recipe.layerwise, epoch_steps=self.epoch_steps)) is not None:
            layerwise(optimizer, inner, policy, total_steps=self.state.max_steps)
        return optimizer

    def _low_rank_optimizer(self, model: torch.nn.Module) -> LowRankAdamW:
        low_rank, args = self.recipe.low_rank, self.args
        assert low_rank is not None
        assert low_rank.rank is not None
        embeddings = self.recipe.embedding == "lowrank"
        own = {name: value for name, value in asdict(low_rank).items() if name not in ("rank", "embedding")}
        if (gum := self.recipe.gum) is not None:
            del own["moments"], own["scaled_by"]
            strategy: Any = "uniform" if self.weights is None else self.weights
            units = gum_groups(model, low_rank.rank, strategy=strategy, unit=gum.unit, embeddings=embeddings)
            each = sum("unit" in group for group in units) // len(find_blocks(model)) if gum.unit == "matrix" else 1
            own |= {"active": gum.active * each, "base": gum.base, "reweight": gum.reweight}
            return GUM(units, weight_decay=args.weight_decay, **self._options(), **own)
        groups = low_rank_groups(model, low_rank.rank, embeddings=embeddings)
        return LowRankAdamW(groups, weight_decay=args.weight_decay, **self._options(), **own)

    def _options(self) -> dict[str, Any]:
        """Options of `LowRankAdamW` that all methods share."""
        args = self.args
        betas = (args.adam_beta1, args.adam_beta2)
        options = {"lr": args.learning_rate, "betas": betas, "eps": args.adam_epsilon, "seed": self.recipe.seed}
        return options | {"rounding": self.recipe.rounds}

    def _rounding(self, model: torch.nn.Module) -> Rounding | None:
        """How narrow weights that train are rounded, None where there are none; what that loses goes to the log."""
        narrow = [p for p in model.parameters() if p.requires_grad and p.dtype in NARROW]
        if not narrow or self.is_deepspeed_enabled:  # which has a float32 master of its own
            if self.recipe.rounding in ("kahan", "master") and self.is_world_process_zero():
                logger.warning("rounding: %s changes nothing: what trains is in float32", self.recipe.rounding)
            return None
        lr, rounding = self.args.learning_rate, self.recipe.rounds
        if rounding == "nearest" and self.is_world_process_zero():
            logger.warning(
                "rounding: nearest. Weights train in %s, and an update as large as the learning rate %g is lost on "
                "%.0f %% of them, at every step; rounding: stochastic keeps it on average and takes no memory",
                str(narrow[0].dtype).removeprefix("torch."),
                lr,
                100 * share_lost(narrow, lr),
            )
        return rounding

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load the state; that of blocks that were frozen is in no checkpoint, and FSDP2 has to be told."""
        held = getattr(self.optimizer, "optimizer", self.optimizer)  # without accelerate's wrapper
        if self.checkpoint is not None and self.is_fsdp_enabled and isinstance(held, GUM):
            held.before_loading(self.checkpoint.step)
        if checkpoint is None or self.sampler is None:
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[no-untyped-call]
            return
        assert self.optimizer is not None
        assert self.checkpoint is not None
        self.sampler.attach(self.optimizer)  # before state comes, which stays in host memory where it is offloaded
        with self.sampler.loading(self.checkpoint.step) if self.is_fsdp_enabled else nullcontext():
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[no-untyped-call]

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """Save the model, without a word of PEFT on the base whose name says that it is no model as it is stored.

        Args:
            args: positional arguments of the Trainer's method.
            kwargs: keyword arguments of the Trainer's method.
        """
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Could not find a config file in .* without ")
            super().save_model(*args, **kwargs)  # type: ignore[no-untyped-call]

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Name what a checkpoint lacks; a tensor that is tied to one it has is none of that."""
        tied = getattr(unwrapped(self.model), "all_tied_weights_keys", None) or {}
        missing = [key for key in load_result.missing_keys if key not in tied]
        if not getattr(self.model, "_keys_to_ignore_on_save", None):  # by which transformers tells what it has to tie
            load_result = load_result._replace(missing_keys=missing)
        super()._issue_warnings_after_load(load_result)  # type: ignore[no-untyped-call]

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """Make no repository: `htsr.finetuning.publishing` has made it.

        Args:
            args: positional arguments of the Trainer's method.
            kwargs: keyword arguments of the Trainer's method.
        """

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Push nothing: what is pushed is the whole result, in the end.

        Args:
            args: positional arguments of the Trainer's method.
            kwargs: keyword arguments of the Trainer's method.
        """

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write nothing yet: htsr writes its own card at the end."""


def _has_label(row: dict[str, Any]) -> bool:
    return any(label != -100 for label in row["labels"][1:])  # what comes first is predicted from nothing
