"""Built-in models and data for speech: a codec, its codes, and a GPT over them."""
