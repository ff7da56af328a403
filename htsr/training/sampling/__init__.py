"""Layer sampling: which blocks of a transformer train now, or which of their matrices (LISA, OwLore, MISA).

================ =======================================================================================================
`members`        what is drawn: which parameters belong to which block or matrix, to the embedding, or to neither
`probabilities`  how likely each block or matrix is to be drawn
`gradient_norms` the same by the gradients that they have had
`draws`          which are drawn
`freezing`       which parameters train, kept so whoever else sets ``requires_grad``
`states`         what becomes of the optimizer state of what is frozen
`offload`        optimizer state in host memory
`coverage`       how often each was trained
`sampler`        `htsr.LayerSampler`
================ =======================================================================================================
"""
