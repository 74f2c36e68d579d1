"""Small, self-contained uses of the loss: point auto-encoders, a VAE, colour transfer."""
