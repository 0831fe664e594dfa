"""Steps that correct the activations of a merged model."""
