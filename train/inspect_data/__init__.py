"""What a recipe's data comes to, without a model and without training."""
