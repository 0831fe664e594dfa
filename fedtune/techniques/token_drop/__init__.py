"""Token drop: blocks run on the blocks of tokens that attend to each other most."""
