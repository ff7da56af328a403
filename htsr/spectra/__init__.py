"""One matrix in, numbers out: spectra, fits and statistics of single weight matrices.

`measure.measure` makes a row (`metrics.LayerMetrics`) of a matrix, as `metrics.Options` ask for. Each statistic is a
pure function, in a module of its own that begins with its definition and source:

============ ==========================================================================================================
spectra      `esd` by `eigenvalues` (`tridiagonal` in float32), `lanczos` or, for a product of factors, `product`;
             `windows`; the result is in `density` (`ESD`)
precision    `resolution`: which eigenvalues are only rounding
the tail     `tail` (power-law fits) by `scan`, `resampling` (how sure they are), `certainty` (of fits in float32);
             `alternatives` with `laws` (other laws); `null` with `known_nulls` (α of noise of the same shape)
the rest     `bulk` (Marchenko-Pastur, spikes, traps) and `permutation` (W in random order), `erg` (trace-log
             condition), `quality`
one number   `scores`, for training
changes      `directions` (projection on a tail), `traps` (their removal), `nudge` (towards α = 2)
a row        `measure`, `statistics` of one spectrum, `metrics`, `notes` (words of caution), `attempts` (what fails
             becomes a row)
============ ==========================================================================================================
"""
