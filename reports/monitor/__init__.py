"""What a SpectralMonitor takes of the time of a training."""
