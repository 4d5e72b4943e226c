"""RMT-KD: a smaller dense model from the eigenvalues of its activations that stand out of the noise."""
