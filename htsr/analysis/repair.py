"""Repair of a fine-tuned model: take back of its change what the spectrum says is noise, or foreign, without data.

    htsr.repair("fine-tuned", "base", "repaired", method="denoise")

`htsr.analysis.repair_methods` has what is left of one change; `htsr.analysis.repair_checkpoints` changes the matrices
of a checkpoint, `htsr.analysis.repair_adapters` the factors of a LoRA adapter, each in a copy of the files.
"""

from __future__ import annotations

import os

from htsr.analysis.repair_adapters import repair_adapter
from htsr.analysis.repair_checkpoints import repair_checkpoint
from htsr.analysis.repair_methods import MethodName, make_method
from htsr.analysis.repair_result import Repair
from htsr.analysis.rewriting import Advance, find
from htsr.errors import UsageError
from htsr.matrices.adapters import adapter_folder
from htsr.matrices.models import Filter


def repair(
    tuned: str | os.PathLike[str],
    against: str | os.PathLike[str] | None = None,
    output: str | os.PathLike[str] | None = None,
    method: MethodName = "denoise",
    *,
    factor: float | None = None,
    k: int | None = None,
    epsilon: float | None = None,
    where: Filter | None = None,
    revision: str | None = None,
    progress: Advance | None = None,
) -> Repair:
    """Take back of a fine-tuned model's change ΔW = W - W_base what its spectrum allows, without data.

    =============== ==================================================================================================
    ``denoise``     singular values of ΔW below the threshold of Gavish & Donoho become 0
    ``ecs``         ΔW on its effective correlation space, the largest eigenvalues whose Σ ln λ̃ is 0
    ``leading``     ΔW on its k leading directions
    ``intruders``   singular values of W's intruder dimensions are multiplied by a factor
    ``interpolate`` factor · ΔW: a point between base and fine-tuned model, and what the others have to beat
    =============== ==================================================================================================

    The copy has the files of the fine-tuned model, weights in their stored dtype; ``htsr_repair.json`` says what was
    done. Tied weights change together. Tensors that are no matrices (norms, biases) stay as fine-tuned, but under
    ``interpolate`` of all matrices they are interpolated as well. Of a LoRA adapter the factors are changed, in their
    rank, and the result is an adapter.

    Args:
        tuned: folder, file (safetensors or PyTorch) or hub id of the fine-tuned model, or folder of its LoRA adapter.
        against: folder, file or hub id of the base model. An adapter's, where the method needs it, is the one that it
            names.
        output: folder to write, which must be empty or not exist yet; None to write nothing, and say what would
            change, with the number of intruders before and after.
        method: what is done; see above.
        factor: factor of the change (``interpolate``, 0.5) or of the intruders' singular values (``intruders``, 0.75).
        k: number of leading directions that are kept (``leading``) or looked at (``intruders``); 10.
        epsilon: cosine with all left singular vectors of the base below which a direction is an intruder; 0.5.
        where: filter of the matrices to change; all others are copied as they are.
        revision: branch, tag or commit of the fine-tuned model's hub id.
        progress: function that is called with (done, total, name) after each matrix.

    Returns:
        A `Repair`. A matrix that cannot be changed is left as it is, and its row says why.

    Raises:
        SourceError: a model cannot be read, no matrix is in both with one name and shape, or the format is not written
            (GGUF, quantised, adapters other than LoRA).
        UsageError: the method or a number of it has no meaning, the base is not said, the output is in use, or no
            matrix passes the filter.
        HtsrError: the output cannot be written.

    Source: DG-Hard (arXiv 2605.20296) with Gavish & Donoho (IEEE Trans. Inf. Theory 60, 2014) for ``denoise``; for
    ``intruders`` arXiv 2410.21228 and PEFT's `reduce_intruder_dimension`; SETOL (arXiv 2507.17912) for the effective
    correlation space, which is our own idea for a change.

    Examples:
        >>> import htsr, torch
        >>> from safetensors.torch import load_file, save_file
        >>> noise = torch.randn(60, 40, generator=torch.Generator().manual_seed(0))
        >>> base, learned = torch.eye(60, 40), torch.ones(60, 40)
        >>> save_file({"layers.0.mlp.up_proj.weight": base}, "base.safetensors")
        >>> save_file({"layers.0.mlp.up_proj.weight": base + learned + 0.1 * noise}, "model.safetensors")
        >>> found = htsr.repair("model.safetensors", "base.safetensors", "repaired")
        >>> found.matrices[0].kept, found.matrices[0].total
        (1, 40)
        >>> repaired = load_file("repaired/model.safetensors")["layers.0.mlp.up_proj.weight"]
        >>> bool((repaired - base - learned).norm() < noise.mul(0.1).norm() / 3)
        True
    """
    chosen = make_method(method, factor, k, epsilon)
    model = find(tuned, revision)
    folder = adapter_folder(model.place)
    if folder is not None:
        return repair_adapter(model, folder, against, output, chosen, where, progress)
    if against is None:
        raise UsageError(f"{model.name} is no adapter: say what it was fine-tuned from (against=…, --against)")
    return repair_checkpoint(model, find(against), output, chosen, where, progress)
