"""Techniques that keep activations in another form: in fewer bits, or in a file."""
