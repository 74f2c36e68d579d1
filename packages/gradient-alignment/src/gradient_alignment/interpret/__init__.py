"""What input gradients mean: saliency maps, how they can be fooled, and tests of them."""
