"""Tools that know no config, no engine and no model; any other program may import them on their own.

agenda       what is to be done at step boundaries
agreement    how ranks decide the same at the same step
batches      endless batches of a dataset that know how far training has come
distributed  devices and their generators; start-up, ranks, collectives
files        files replaced whole, files that only grow, a file that one process holds
io           state dicts and JSON on disk, exact and atomic
memory       peak memory, and whether it ran out
mishaps      what goes wrong in a step, and the policy for it
pace         what the clock says of steps
packing      a nest of values as JSON and named tensors
permutation  a keyed permutation, block by block
place        where a process stands among those of its run
sampler      pool, ordered, batched and random samplers that save and load their state
steps        one step on every rank, and what becomes of one that goes wrong
train        the loop
wrapper      changes to a module that is there already
utils        the few helpers without a file of their own
"""
