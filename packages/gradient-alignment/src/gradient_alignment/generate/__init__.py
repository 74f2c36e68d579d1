"""Classifiers as generative models: samples, the GAN-test, density ratios and alignment with the data."""
