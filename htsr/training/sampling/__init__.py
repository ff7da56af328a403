"""Layer sampling: which blocks of a transformer train now (LISA, OwLore and their relatives).

=============== ========================================================================================================
`members`       which parameters belong to which block, to the embedding, or to neither
`probabilities` how likely each block is to be drawn
`freezing`      which parameters train, kept so whoever else sets ``requires_grad``
`offload`       optimizer state of frozen blocks in host memory
`coverage`      how often each block was trained
`sampler`       `htsr.LayerSampler`
=============== ========================================================================================================
"""
