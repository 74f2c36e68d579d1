"""Adapters to training libraries; imported only where they are used."""
