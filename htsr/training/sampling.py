"""Which blocks of a transformer train now: layer-sampled training (LISA, OwLore) and its relatives.

    sampler = LayerSampler(model, "owlore", scores=outliers, active=2, interval=50)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)    # all parameters
    sampler.attach(optimizer)                                     # after DDP, FSDP2 or accelerator.prepare
    # train as always

Every K optimizer steps γ blocks are drawn without replacement; all others are frozen, their gradients are gone at
once, and their optimizer state is dropped, kept, or moved to host memory. Draw n is a function of the seed and n alone,
so all ranks draw the same blocks without a word between them. The sampler's own state rides in the optimizer's.

Sources: LISA (arXiv 2403.17919), OwLore (arXiv 2405.18380), Spectrum (arXiv 2406.06623).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import numpy as np

from htsr.errors import HtsrError, UsageError
from htsr.matrices.blocks import Blocks, find_blocks
from htsr.matrices.entries import clean_name
from htsr.matrices.sharded import refuse_flat
from htsr.outliers import OWLORE_THRESHOLD
from htsr.training.block_scores import Scores, Strategy, Vector, block_probabilities, inclusion_probabilities

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

Embedding: TypeAlias = Literal["freeze", "train", "lowrank", "sampled"]
FrozenState: TypeAlias = Literal["drop", "keep", "offload"]

EMBEDDING = "embedding and head"
_KEY = "layer_sampler"  # of the state in the optimizer's first group


@dataclass(frozen=True)
class Coverage:
    """How often one block was drawn.

    Attributes:
        name: the block.
        probability: p of the first draw of an interval.
        intervals: intervals it has trained in so far, the current one included once a step is taken.
        expected: the number to expect of as many intervals (without replacement).
    """

    name: str
    probability: float
    intervals: int
    expected: float


class LayerSampler:
    """Draws the blocks that train, and freezes the others.

    Only parameters that are trainable when the sampler is made take part, so on a PEFT model it is the adapters that
    are sampled by block. The optimizer must hold all of them, which `attach` insists on: one that took its view of the
    parameters while some were frozen would train nothing new (OptimalScale/LMFlow#726). After the first step of each
    interval the sampler makes sure that every drawn block has been updated.

    What ``embedding`` means, for the input embedding with all that comes before the first block, and for the head (one
    tensor where they are tied); the rest outside of the blocks (final norm, classifier) always trains:

    - ``freeze``, the default. The published methods train them in every step. At small vocabularies that is cheap; at
      LLaMA-3-8B (128k tokens) they are 71 % of all that LISA trains, with gradients and two Adam moments each. Nothing
      in a fine-tuning set asks for new token vectors as a rule (LoRA's default leaves them alone, too), and with a
      frozen embedding backward ends at the lowest active block instead of running through all of them.
    - ``train``: as the papers do. To be chosen for new tokens, new languages, or to repeat published numbers.
    - ``lowrank``: as ``train``; it says that the optimizer is to hold them at low rank, as `htsr.low_rank_groups` does
      with ``embeddings=True``.
    - ``sampled``: they are one more member of the draw, with the mean probability of the blocks.

    With DDP give the wrapper ``find_unused_parameters=True``: it waits for the gradients of all parameters otherwise.
    FSDP2 follows the switching of ``requires_grad`` by itself if each block is a unit of its own.

    Args:
        model: any transformers encoder or decoder, wrapped or not; blocks as `find_blocks` finds them.
        strategy: ``owlore`` and ``reverse`` (outliers), ``uniform`` (LISA), ``alpha``, ``erg`` and ``snr`` (of an
            analysis), ``increase``, ``decrease`` (with depth), or the probabilities themselves; see
            `block_probabilities`.
        scores: the `Outliers` or the `Analysis` that the strategy needs.
        active: γ, blocks that train at a time.
        interval: K, optimizer steps between draws.
        top: train the γ most probable blocks for good, instead of sampling.
        embedding: see above.
        frozen_state: what becomes of the optimizer state of a block that is frozen: ``drop`` (starts anew next time),
            ``keep`` (memory grows to that of full training), ``offload`` (to host memory).
        seed: of the draws.
        threshold: τ of the outlier distribution.

    Attributes:
        names: the members of the draw: blocks, and with ``sampled`` embedding and head at the end.
        probabilities: (members,) float64 that sum to 1.

    Raises:
        UsageError: an argument without meaning here.
        SourceError: a model without blocks.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        strategy: Strategy | Sequence[float] = "uniform",
        *,
        scores: Scores | None = None,
        active: int = 2,
        interval: int = 50,
        top: bool = False,
        embedding: Embedding = "freeze",
        frozen_state: FrozenState = "drop",
        seed: int = 0,
        threshold: float = OWLORE_THRESHOLD,
    ) -> None:
        if embedding not in get_args(Embedding) or frozen_state not in get_args(FrozenState):
            known = f"{', '.join(get_args(Embedding))}, and {', '.join(get_args(FrozenState))}"
            raise UsageError(f"embedding {embedding!r} and frozen_state {frozen_state!r} are among {known}")
        if interval < 1:
            raise UsageError(f"interval is a number of optimizer steps, not {interval}")
        blocks = find_blocks(model)
        self.probabilities = block_probabilities(strategy, blocks, scores, threshold)
        self.names = blocks.names
        self._members, self._embedding = _trainable_names(model, blocks)
        if embedding == "sampled" and self._embedding:
            self.names = (*self.names, EMBEDDING)
            self._members.append(self._embedding)
            mean = 1 / len(blocks)
            self.probabilities = np.append(self.probabilities, mean) / (1 + mean)
        empty = [name for name, names in zip(self.names, self._members, strict=True) if not names]
        if empty:
            raise UsageError(f"{empty[0]} has no trainable parameters; make the sampler before freezing anything")
        possible = int((self.probabilities > 0).sum())
        if not 1 <= active <= possible:
            raise UsageError(f"active is between 1 and the {possible} blocks with a probability above 0, not {active}")
        self.model, self.interval, self.top = model, interval, top
        self.embedding, self.frozen_state, self.seed, self._gamma = embedding, frozen_state, seed, active
        self._optimizer: torch.optim.Optimizer | None = None
        self._parameters: list[list[torch.nn.Parameter]] = []
        self._steps, self._active, self._loading = 0, self.draw(0), False
        self._counts = np.zeros(len(self.names), dtype=np.int64)

    @property
    def active(self) -> tuple[int, ...]:
        """Indices of the members that train now, ascending."""
        return self._active

    @property
    def steps(self) -> int:
        """Optimizer steps taken."""
        return self._steps

    def draw(self, number: int) -> tuple[int, ...]:
        """The members of interval `number`, ascending: a function of the seed and the number alone.

        Args:
            number: of the interval, counted from 0.
        """
        if self.top:
            order = np.argsort(-self.probabilities, kind="stable")
            return tuple(sorted(int(i) for i in order[: self._gamma]))
        random = np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, number])))
        drawn = random.choice(len(self.names), size=self._gamma, replace=False, p=self.probabilities)
        return tuple(sorted(int(i) for i in drawn))

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Begin: freeze what does not train now, and count this optimizer's steps from here on.

        Call it after the model was wrapped (DDP, FSDP2, `accelerator.prepare`) and, when resuming, at any time: the
        state that a loaded optimizer brings is taken up before as after.

        From then on a step of the optimizer raises `HtsrError` where a block that is to train got no gradient.

        Args:
            optimizer: over all parameters of the model that train, also as accelerate wraps it. A second call with the
                same one does nothing.

        Raises:
            UsageError: the sampler has another optimizer already, the optimizer lacks parameters of the blocks, DDP
                would wait for frozen ones, FSDP1 has flattened them, or sharded state is to be offloaded.
        """
        optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
        if optimizer is self._optimizer:
            return
        refuse_flat(self.model)
        if self._optimizer is not None:
            raise UsageError("this sampler is attached to an optimizer already; make another for another run")
        by_name = {clean_name(name): parameter for name, parameter in self.model.named_parameters()}
        self._parameters = [[by_name[name] for name in names] for names in self._members]
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for name, parameters in zip(self.names, self._parameters, strict=True):
            if any(id(parameter) not in held for parameter in parameters):
                raise UsageError(
                    f"the optimizer lacks parameters of {name}: give it all of the (wrapped) model's parameters, "
                    "before anything is frozen"
                )
        _insist_on_unused_parameters(self.model)
        if self.embedding == "freeze":
            for name in self._embedding:
                self._freeze(by_name[name], optimizer)
            _stop_input_gradients(self.model)
        self._optimizer = optimizer
        if _KEY in optimizer.param_groups[0]:
            self.load_state_dict(optimizer.param_groups[0][_KEY])
        else:
            self._apply()
        optimizer.register_step_post_hook(lambda *_: self._after_step())
        optimizer.register_load_state_dict_post_hook(
            lambda loaded: self.load_state_dict(loaded.param_groups[0].get(_KEY, {}))
        )

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and lists; also in the optimizer's state dict under ``layer_sampler`` of the first group."""
        return {
            "seed": self.seed,
            "steps": self._steps,
            "active": list(self._active),
            "counts": [int(count) for count in self._counts],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` stood.

        Args:
            state: from `state_dict`; its seed replaces the sampler's own.

        Raises:
            UsageError: the state of no sampler, or of one with another number of blocks.
        """
        if set(state) != {"seed", "steps", "active", "counts"} or len(state["counts"]) != len(self.names):
            raise UsageError(f"the checkpoint has no state of a sampler over {len(self.names)} blocks")
        self.seed, self._steps = state["seed"], state["steps"]
        self._active = tuple(state["active"])
        self._counts = np.array(state["counts"], dtype=np.int64)
        if self._optimizer is not None:
            self._apply()

    @contextmanager
    def loading(self, steps: int) -> Iterator[None]:
        """To load a checkpoint into sharded parameters under it, after `attach`.

        torch loads the state of those parameters only that require gradients, and insists on one for each of them.

        Args:
            steps: optimizer steps that were done when the checkpoint was saved.
        """
        now, before = steps // self.interval, max(steps - 1, 0) // self.interval
        if self.frozen_state == "drop":
            known = set(self.draw(now)) & set(self.draw(before))
        else:
            known = {member for number in range(before + 1) for member in self.draw(number)}
        for index, parameters in enumerate(self._parameters):
            for parameter in parameters:
                parameter.requires_grad_(index in known)
        self._loading = True  # torch makes a step without gradients, so that there is state to be filled
        try:
            yield
        finally:
            self._loading = False
            self._apply()

    def coverage(self) -> tuple[Coverage, ...]:
        """How often each member was drawn so far, and how often to expect; one `Coverage` for each of `names`."""
        share: Vector = np.array([float(i in self._active) for i in range(len(self.names))])
        if not self.top:
            share = inclusion_probabilities(self.probabilities, self._gamma)
        intervals = self._counts.sum() / self._gamma
        return tuple(
            Coverage(name, float(p), int(count), float(expected * intervals))
            for name, p, count, expected in zip(self.names, self.probabilities, self._counts, share, strict=True)
        )

    def _after_step(self) -> None:
        if self._loading:
            return
        if self._steps % self.interval == 0:
            self._insist_on_updates()
            self._counts[list(self._active)] += 1
        self._steps += 1
        if self._steps % self.interval == 0:
            before, self._active = self._active, self.draw(self._steps // self.interval)
            logger.info("step %d: training %s", self._steps, ", ".join(self.names[i] for i in self._active))
            self._apply()
            _set_up_anew(self.model, {name for i in set(self._active) - set(before) for name in self._members[i]})
        else:
            self._write_state()

    def _apply(self) -> None:
        assert self._optimizer is not None
        for index, parameters in enumerate(self._parameters):
            for parameter in parameters:
                if index in self._active:
                    parameter.requires_grad_(True)
                    if self.frozen_state == "offload":
                        _move_state(self._optimizer, parameter, parameter.device)
                else:
                    self._freeze(parameter, self._optimizer)
        self._write_state()

    def _freeze(self, parameter: torch.nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
        parameter.requires_grad_(False)
        parameter.grad = None
        if self.frozen_state == "drop":
            optimizer.state.pop(parameter, None)
        elif self.frozen_state == "offload":
            _move_state(optimizer, parameter, "cpu")

    def _write_state(self) -> None:
        assert self._optimizer is not None
        self._optimizer.param_groups[0][_KEY] = self.state_dict()

    def _insist_on_updates(self) -> None:
        assert self._optimizer is not None
        if not self._optimizer.state:
            return  # an optimizer without state, such as plain SGD, does not tell
        held = {id(parameter) for group in self._optimizer.param_groups for parameter in group["params"]}
        if not any(id(parameter) in held for parameters in self._parameters for parameter in parameters):
            raise UsageError(
                "the optimizer holds other parameters than when the sampler was attached: DeepSpeed's ZeRO and FSDP1 "
                "flatten them, and no block can be trained alone; take DDP or FSDP2"
            )
        for index in self._active:
            if not any(parameter in self._optimizer.state for parameter in self._parameters[index]):
                raise HtsrError(
                    f"{self.names[index]} is to train and the optimizer did not update it: it got no gradient. A "
                    "wrapper may have been made while it was frozen, or reentrant checkpointing needs "
                    "gradient_checkpointing_kwargs={'use_reentrant': False}"
                )


def _set_up_anew(model: torch.nn.Module, thawed: set[str]) -> None:
    """FSDP2 settles a unit's dtypes once, by the parameters that require gradients then; have it do so again."""
    units = {clean_name(f"{name}.") if name else "": m for name, m in model.named_modules() if hasattr(m, "unshard")}
    if not units:
        return
    for prefix in {max((prefix for prefix in units if name.startswith(prefix)), key=len) for name in thawed}:
        unit: Any = units[prefix]
        unit.unshard()
        unit.reshard()


def _trainable_names(model: torch.nn.Module, blocks: Blocks) -> tuple[list[list[str]], list[str]]:
    """Names of the trainable parameters of each block, and of embedding and head."""
    ends = set()
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        try:
            module = getattr(model, getter)()
        except (AttributeError, NotImplementedError):
            continue
        ends |= {id(parameter) for parameter in module.parameters()} if module is not None else set()
    members: list[list[str]] = [[] for _ in blocks.names]
    embedding = []
    before = True
    for name, parameter in model.named_parameters():
        index = blocks.index_of(name)
        before = before and index is None
        if not parameter.requires_grad:
            continue
        if index is not None:
            members[index].append(clean_name(name))
        elif before or id(parameter) in ends:
            embedding.append(clean_name(name))
    return members, embedding


def _insist_on_unused_parameters(model: torch.nn.Module) -> None:
    from torch.nn.parallel import DistributedDataParallel

    if isinstance(model, DistributedDataParallel) and not model.find_unused_parameters:
        raise UsageError("layer sampling under DDP needs DistributedDataParallel(…, find_unused_parameters=True)")


def _stop_input_gradients(model: torch.nn.Module) -> None:
    """Undo `enable_input_require_grads`, which transformers calls with checkpointing: backward ran through all blocks.

    Only reentrant checkpointing needs it, and keeps it.
    """
    for module in model.modules():
        if getattr(module, "_require_grads_hooks", None):
            if any(_is_reentrant(inner) for inner in module.modules()):
                logger.warning(
                    "reentrant checkpointing makes backward run through the frozen blocks below; "
                    "gradient_checkpointing_kwargs={'use_reentrant': False} does not"
                )
            else:
                module.disable_input_require_grads()  # type: ignore[operator]


def _is_reentrant(module: torch.nn.Module) -> bool:
    keywords = getattr(getattr(module, "_gradient_checkpointing_func", None), "keywords", {})
    return bool(getattr(module, "gradient_checkpointing", False) and keywords.get("use_reentrant"))


def _move_state(optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter, device: Any) -> None:
    """Move the tensors of one parameter's state; its step count stays where the optimizer wants it."""
    import torch

    state = optimizer.state.get(parameter, {})
    for key, value in state.items():
        if torch.is_tensor(value) and value.ndim > 0 and value.device != torch.device(device):
            if type(value).__name__ == "DTensor":
                raise UsageError("sharded optimizer state cannot be offloaded block by block: take drop or keep")
            state[key] = value.to(device)
