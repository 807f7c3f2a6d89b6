"""Built-in models and data of speech: a codec, its codes, and a GPT over them."""
