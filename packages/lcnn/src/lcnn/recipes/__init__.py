"""The paper's networks, data and training runs."""
