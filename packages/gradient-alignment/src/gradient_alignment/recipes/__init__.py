"""The paper's experiments: networks, data, training and evaluation."""
