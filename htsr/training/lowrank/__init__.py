"""AdamW whose states, and if wanted gradients, live in low-rank subspaces of the gradients.

============ ===========================================================================================================
`groups`     which parameters of a model are trained at low rank
`subspace`   the subspace of a gradient: its basis, the way in, the way back
`moments`    Adam's moments as they are stored: float32, bfloat16 or 8 bits
`rounding`   stochastic rounding of narrow weights
`update`     Adam's update of many parameters together, of all these
`scaling`    what a random projection tells of the length of a step along the whole gradient (APOLLO)
`projection` the gradient of a parameter at a step, in its subspace, which is renewed where that is due
`released`   what stands in ``parameter.grad`` once a gradient was taken up during backward
`sealing`    loading of states as they were saved
`optimizer`  `htsr.LowRankAdamW`
============ ===========================================================================================================
"""
