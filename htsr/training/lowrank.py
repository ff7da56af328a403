"""AdamW whose states, and if wanted gradients, live in low-rank subspaces of the gradients (GaLore, arXiv 2403.03507).

    optimizer = LowRankAdamW(low_rank_groups(model, rank=128), lr=1e-3)

Per matrix: R = G projected; Adam on R; W ← (1 - lr·weight_decay)·W - lr·scale·(Adam's direction projected back). The
subspace is that of the gradient at the steps 0, T, 2T …. Parameters without a rank get torch.optim.AdamW's update.
"""

from __future__ import annotations

import hashlib
import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from htsr.errors import HtsrError, UsageError
from htsr.training import moments as stored
from htsr.training.moments import BLOCK, STATE_DTYPES, StateDtype
from htsr.training.projection import (
    Method,
    add_projected_back,
    is_distributed,
    local,
    project,
    projector,
    rotated,
)

Gradients: TypeAlias = Literal["keep", "project", "update"]
Group: TypeAlias = dict[str, Any]

_PIECE = 2**22  # entries


def adam_update(
    R: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: int, betas: tuple[float, float], eps: float
) -> Tensor:
    """Adam's direction m̂/(√v̂ + eps) for a gradient R at step 1, 2, …; both moments are updated in place.

    Args:
        R: gradient, of any shape.
        exp_avg: first moment before the step, in the shape and dtype of R; changed.
        exp_avg_sq: second moment, in the same shape and dtype; changed.
        step: counted from 1.
        betas: β₁ and β₂.
        eps: added to the corrected root, as in torch.

    Returns:
        The direction, in the shape and dtype of R.

    Source: Adam (Kingma & Ba, arXiv 1412.6980), algorithm 1.
    """
    beta1, beta2 = betas
    exp_avg.lerp_(R, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(R, R, value=1 - beta2)
    denominator = exp_avg_sq.sqrt().div_(math.sqrt(1 - beta2**step)).add_(eps)
    return torch.div(exp_avg, denominator, out=denominator).div_(1 - beta1**step)


class LowRankAdamW(torch.optim.Optimizer):
    """AdamW on projected gradients.

    A group with the key ``rank`` holds matrices, or stacks (E, m, n) of them, and is projected; a group without is
    plain AdamW. All options but `gradients` and `process_group` can differ by group and are part of the state dict, as
    are step, projector (`projector`: (min(m, n), r), of a stack (E, min(m, n), r)) and moments, all plain tensors: it
    loads with ``torch.load(weights_only=True)``, and a resumed run repeats the uninterrupted one bit for bit.

    With exact SVD and kept moments the update is that of galore-torch's AdamW, but that weights decay before the update
    and eps is added after the bias correction, both as in torch.optim.AdamW.

    Parameters may be DTensors (FSDP2, tensor parallel): a gradient is gathered, one matrix at a time, when its
    projector is computed, and projected shard by shard otherwise; moments are sharded where the matrix side that they
    keep is. Under DDP every rank computes the same. fp16 with a GradScaler needs ``gradients="keep"``.

    Args:
        params: parameters or groups, as from `low_rank_groups`.
        lr: learning rate, as in torch.optim.AdamW.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment, after its bias correction.
        weight_decay: decoupled, W ← (1 - lr·weight_decay)·W.
        scale: factor of the low-rank updates, α in the paper.
        refresh_every: T, optimizer steps between projectors.
        method: ``randomized`` subspace iteration, or exact ``svd``.
        moments: at a refresh, ``keep`` them as they are (the paper) or ``rotate`` them into the new subspace.
        state_dtype: of the moments: ``float32``, ``bfloat16``, or ``8bit`` (bitsandbytes). The projector has the
            gradient's dtype.
        seed: of the randomised method; its numbers are a function of seed, parameter and step.
        gradients: ``keep`` them until the caller drops them, as torch does; ``project`` each low-rank matrix's gradient
            as soon as backward has it and add it up in the subspace until `step`, so that no full gradient outlives
            its matrix and gradients accumulate at the size of one moment; ``update`` each parameter as soon as
            backward has its gradient, so that none is kept: one backward is one step, and `step` does nothing. The sum
            of projected gradients is the projected sum, up to rounding; at a refresh step the subspace is that of the
            first backward since the last step.
        process_group: ranks with copies of the model, over which the optimizer averages what ``project`` and ``update``
            release too early for DDP: run backward on the bare module or under ``no_sync()``.

    Raises:
        UsageError: an option without meaning, or a group with rank that holds anything but matrices.
        MissingDependencyError: at the first step, ``8bit`` without bitsandbytes.

    Source: GaLore (arXiv 2403.03507), algorithm 2; AdamW (arXiv 1711.05101), algorithm 2.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        scale: float = 0.25,
        refresh_every: int = 200,
        method: Method = "randomized",
        moments: Literal["keep", "rotate"] = "keep",
        state_dtype: StateDtype = "float32",
        seed: int = 0,
        gradients: Gradients = "keep",
        process_group: ProcessGroup | None = None,
    ) -> None:
        if gradients not in ("keep", "project", "update"):
            raise UsageError(f"unknown gradients {gradients!r}: keep, project or update")
        if process_group is not None and gradients == "keep":
            raise UsageError("process_group is for gradients='project' or 'update'; kept gradients are averaged by DDP")
        self.gradients = gradients
        self.process_group = process_group
        self._hooked: set[Tensor] = set()
        self._released: set[Tensor] = set()  # since the last step, as the next two
        self._projected: dict[Tensor, Tensor] = {}  # sums of projected gradients
        self._ready: dict[Tensor, Tensor] = {}  # what clipping has already taken
        self._places: dict[Tensor, tuple[Group, int]] = {}
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "rank": None,
            "scale": scale,
            "refresh_every": refresh_every,
            "method": method,
            "moments": moments,
            "state_dtype": state_dtype,
            "seed": seed,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: Group) -> None:
        """Add a group.

        Args:
            param_group: as in torch; with the key ``rank`` all of its parameters are matrices.

        Raises:
            UsageError: an option without meaning, or a group with rank that holds anything but matrices.
        """
        super().add_param_group(param_group)
        _check(self.param_groups[-1])
        self._places.clear()
        self._hook()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: evaluates the model again, as in torch.

        Returns:
            What the closure returns; None without one.

        Raises:
            HtsrError: a gradient with NaN or Inf where a projector is due.
            UsageError: a sparse gradient, or one that DDP brought back after it was released.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group, parameter, index in self._members():
            R = self._ready.pop(parameter, None)
            R = self._take(group, parameter, index) if R is None else R
            if R is not None:
                self._apply(group, parameter, R)
        self._released.clear()
        self._places.clear()
        self._hook()
        return loss

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scale the coming step's gradients to a global norm of at most `max_norm`; returns the norm before.

        Call it between backward and `step` in place of ``torch.nn.utils.clip_grad_norm_``, which does not see projected
        gradients. The norm is that of what the optimizer will use: ‖R‖_F for low-rank matrices, which is ‖G‖_F less the
        part outside the subspace, ‖G‖_F for the others, over all parameters and processes.

        Args:
            max_norm: the largest norm that is left as it is.

        Returns:
            The norm before, a scalar in float32 at least; 0 where there is no gradient.

        Raises:
            HtsrError: a gradient with NaN or Inf where a projector is due.
            UsageError: with ``gradients="update"`` there is no moment at which all gradients are known.
        """
        if self.gradients == "update":
            raise UsageError("a global norm cannot be known while updating during backward; take gradients='project'")
        for group, parameter, index in self._members():
            if parameter not in self._ready and (R := self._take(group, parameter, index)) is not None:
                self._ready[parameter] = R
        if not self._ready:
            return torch.zeros(())
        norms = [
            torch.linalg.vector_norm(R, dtype=torch.promote_types(R.dtype, torch.float32)) for R in self._ready.values()
        ]
        norms = [norm.full_tensor() if is_distributed(norm) else norm for norm in norms]  # type: ignore[attr-defined]
        total = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))
        factor = (max_norm / (total + 1e-6)).clamp(max=1.0)
        for R in self._ready.values():
            local(R).mul_(factor.to(R.device, R.dtype))
        return total

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients, the projected ones too.

        Args:
            set_to_none: as in torch; projected gradients are dropped in either case.
        """
        super().zero_grad(set_to_none)
        self._released.clear()
        self._projected.clear()
        self._ready.clear()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but tensors keep the dtype that they were saved in; torch casts them to the parameter's.

        Args:
            state_dict: from `state_dict` of an optimizer with the same groups.
        """
        super().load_state_dict(state_dict)
        self._places.clear()
        identifiers = (identifier for group in state_dict["param_groups"] for identifier in group["params"])
        for identifier, (_, parameter, _) in zip(identifiers, self._members(), strict=True):
            for name, value in state_dict["state"].get(identifier, {}).items():
                if torch.is_tensor(value) and name != "step":
                    self.state[parameter][name] = value.detach().to(parameter.device, copy=True)

    def _members(self) -> Iterator[tuple[Group, Tensor, int]]:
        index = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                yield group, parameter, index
                index += 1

    def _hook(self) -> None:
        """Release gradients during backward; parameters that were exchanged since (FSDP) are found at the next step."""
        if self.gradients == "keep":
            return
        optimizer = weakref.ref(self)  # parameters outlive an optimizer, and its hooks are then idle

        def hook(parameter: Tensor) -> None:
            if (alive := optimizer()) is not None:
                alive._release(parameter)

        for group, parameter, _ in self._members():
            if parameter not in self._hooked and (self.gradients == "update" or group["rank"] is not None):
                trains = parameter.requires_grad
                parameter.requires_grad_(True)  # torch hooks no frozen tensor; the hook outlives freezing
                parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
                parameter.requires_grad_(trains)
                self._hooked.add(parameter)

    @torch.no_grad()
    def _release(self, parameter: Tensor) -> None:
        """Runs as soon as backward has the parameter's whole gradient."""
        if not self._places:  # groups may have been split or loaded since the last step
            self._places = {member: (group, index) for group, member, index in self._members()}
        group, index = self._places[parameter]
        if parameter.grad is None:
            raise UsageError(f"parameter {index} is updated during backward by another optimizer, too; delete one")
        if self.gradients == "project":
            R = self._project(group, parameter, index)
            known = self._projected.get(parameter)
            self._projected[parameter] = R if known is None else known.add_(R)
        else:
            if self._optimizer_step_pre_hooks:
                raise UsageError("step hooks do not act on updates during backward; take gradients='project'")
            self._apply(group, parameter, self._average(self._gradient(group, parameter, index)))
        parameter.grad = None
        self._released.add(parameter)

    def _take(self, group: Group, parameter: Tensor, index: int) -> Tensor | None:
        """The gradient of the coming step, projected, averaged over the ranks."""
        if parameter in self._released and parameter.grad is not None:
            raise UsageError(
                f"parameter {index} got its gradient back, which gradients={self.gradients!r} had released, from DDP: "
                "run backward under no_sync() and pass process_group, or take gradients='keep'"
            )
        if (R := self._projected.pop(parameter, None)) is not None:
            return self._average(R)
        return None if parameter.grad is None else self._average(self._gradient(group, parameter, index))

    def _gradient(self, group: Group, parameter: Tensor, index: int) -> Tensor:
        """What Adam will see of the parameter's gradient."""
        assert parameter.grad is not None
        if parameter.grad.is_sparse:
            raise UsageError(f"parameter {index} has a sparse gradient; make its embedding with sparse=False")
        return parameter.grad if group["rank"] is None else self._project(group, parameter, index)

    def _average(self, gradient: Tensor) -> Tensor:
        if self.process_group is None:
            return gradient
        torch.distributed.all_reduce(gradient, group=self.process_group)
        return gradient.div_(self.process_group.size())

    def _project(self, group: Group, parameter: Tensor, index: int) -> Tensor:
        """The parameter's gradient in its subspace, which is computed anew where that is due."""
        state, G = self.state[parameter], parameter.grad
        assert G is not None
        if G.ndim < 2:
            raise UsageError(
                f"parameter {index} of a group with rank has become flat, {tuple(G.shape)}: DeepSpeed's ZeRO and FSDP1 "
                "leave no matrix to project; take DDP or FSDP2"
            )
        step = int(state["step"].item()) if "step" in state else 0
        old = state.get("projector")
        if old is None or (step % group["refresh_every"] == 0 and parameter not in self._projected):
            G = self._average(G)
            generator = torch.Generator().manual_seed(_seed(group["seed"], index, step))
            try:
                state["projector"] = new = projector(G, group["rank"], group["method"], old, generator)
            except HtsrError as error:
                where = f"parameter {index} ({'×'.join(map(str, G.shape))}) at step {step + 1}"
                raise type(error)(f"{where}: {error}") from error
            if group["moments"] == "rotate" and old is not None and "exp_avg" in state:
                moments = stored.read(state, "exp_avg"), stored.read(state, "exp_avg_sq")
                for name, value in zip(("exp_avg", "exp_avg_sq"), rotated(*moments, old, new, G.shape), strict=True):
                    stored.write(state, name, value)
        return project(G, state["projector"])

    def _apply(self, group: Group, parameter: Tensor, R: Tensor) -> None:
        """One update of one parameter by its (projected) gradient."""
        state = self.state[parameter]
        if "exp_avg" not in state:
            state["step"] = torch.zeros(())
            stored.create(state, R, group["state_dtype"])
        state["step"] += 1
        step, lr, W, G = int(state["step"].item()), float(group["lr"]), local(parameter), local(R)
        if group["weight_decay"]:
            W.mul_(1 - lr * group["weight_decay"])
        if group["rank"] is not None:
            direction = _direction(state, group, G, step)
            add_projected_back(parameter, direction.to(W.dtype), state["projector"], -lr * group["scale"])
            return
        for rows in _pieces(W):
            W[rows].add_(_direction(state, group, G, step, rows), alpha=-lr)


def _direction(state: dict[str, Any], group: Group, G: Tensor, step: int, rows: Any = ...) -> Tensor:
    """Adam's direction for these rows; their moments are updated."""
    exp_avg, exp_avg_sq = stored.read(state, "exp_avg", rows), stored.read(state, "exp_avg_sq", rows)
    direction = adam_update(G[rows].to(exp_avg.dtype), exp_avg, exp_avg_sq, step, group["betas"], group["eps"])
    stored.write(state, "exp_avg", exp_avg, rows)
    stored.write(state, "exp_avg_sq", exp_avg_sq, rows)
    return direction


def _pieces(W: Tensor) -> list[Any]:
    """Rows to update at a time, so that temporaries stay small beside an embedding."""
    if W.numel() <= _PIECE:
        return [...]
    rows = max(_PIECE // W[0].numel() // BLOCK, 1) * BLOCK
    return [slice(start, start + rows) for start in range(0, W.shape[0], rows)]


def _seed(*numbers: int) -> int:
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


def _check(group: Group) -> None:
    for name, known in (
        ("method", ("svd", "randomized")),
        ("moments", ("keep", "rotate")),
        ("state_dtype", STATE_DTYPES),
    ):
        if group[name] not in known:
            raise UsageError(f"unknown {name} {group[name]!r}: one of {', '.join(known)}")
    for name in ("lr", "eps", "weight_decay"):
        if not float(group[name]) >= 0:
            raise UsageError(f"{name} is {group[name]}; it is at least 0")
    if not all(0 <= beta < 1 for beta in group["betas"]):
        raise UsageError(f"betas are {group['betas']}; both are in [0, 1)")
    if group["rank"] is None:
        return
    for name in ("rank", "refresh_every"):
        if group[name] < 1:
            raise UsageError(f"{name} is {group[name]}; it is at least 1")
    for parameter in group["params"]:
        if parameter.ndim not in (2, 3):
            raise UsageError(
                "a group with rank holds matrices and stacks of them, and one of its parameters is "
                f"{tuple(parameter.shape)}"
            )
