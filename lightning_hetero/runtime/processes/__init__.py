"""Several processes that share every batch, each with devices of its own.

exchange          small plain data from rank to rank
group             the processes of a run
loader            a data loader that gives a process its rows of every batch
loader_agreement  what the loaders of all processes have in common, and what is refused
dealt_sampler     the order of samples, the same in all processes
row_ledger        how many rows of a batch are whose
reducer           sums of gradients
buckets           gradients that travel together
sums              sums on their way
batch_norm        batch normalisation over the rows of all processes
"""
