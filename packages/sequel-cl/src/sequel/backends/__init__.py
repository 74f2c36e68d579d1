"""The training states of the two backends; each runs :func:`sequel.engine.one_step`."""
