"""How good a model is: in training, and of its own accord as the verb `evaluate`."""
