"""SETOL's three-layer perceptron on MNIST, trained across batch sizes and learning rates."""
