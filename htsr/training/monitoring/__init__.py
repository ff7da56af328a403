"""Spectra of a model while it trains, for a share of its time.

=========== ============================================================================================================
`monitor`   `SpectralMonitor`, for any training loop
`hooks`     how the Trainer and Lightning call it
`rounds`    which matrix is next, what is known of each, and how old that is
`budget`    what may be spent of the time of training
`measuring` the matrices of a model in training, measured by all processes together
`record`    the trajectory file, and what was kept of the weights at the start
`alarms`    what is warned of
=========== ============================================================================================================
"""
