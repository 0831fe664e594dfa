"""Training by forward passes alone: the slope of the loss along random directions takes the place of its gradient."""
