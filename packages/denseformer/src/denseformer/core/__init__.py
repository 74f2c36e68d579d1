"""The method itself: index sets, plan, products, autograd, and the module that holds the weights."""
