"""Control of a run while it goes on: typed commands, their handlers, standard input and signals."""
