"""One matrix in, numbers out: spectra, fits and statistics of single weight matrices."""
