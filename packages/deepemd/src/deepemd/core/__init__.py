"""The core: clouds, distances, the network, its decoders, bounds and checkpoints."""
