"""Measuring networks: curvature, gradient stability, attacks, figures."""
