"""Several processes that share every batch, each with devices of its own.

exchange     small plain data from rank to rank
group        the processes of a run
dealing      whose rows of a batch are whose
loader       a data loader that gives a process its rows of every batch
reducer      sums of gradients
batch_norm   batch normalisation over the rows of all processes
"""
