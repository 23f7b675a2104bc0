"""Pipelined mode: the calls of a region are cut into micro-batches that flow through the devices at the same time.

The pieces, from the bottom up::

    tree            structures of tensors, taken apart and put together
    state           what a thread must hand to another for an operation to mean the same
    faults          errors that say where they happened, waiting that ends
    record          what workers did and when, as a timeline
    worker          one thread per device, which takes tasks in order
    lanes           threads that run the user's code for one micro-batch each
    leaves          which parameters a graph depends on, and sums of their gradients in a fixed order
    at_once         large gradients, added up while they are in the processor's caches
    streams         random numbers that depend on micro-batch and call, not on timing
    fresh           tensors that nobody has touched since they were made
    inputs          what a unit is called with, on its device
    cut             a call of a placed module from a lane: task, cut of the graph, task of the backward
    batch           inputs cut into rows, outputs joined
    silence         hooks on parameters, silent while parts of gradients are computed
    unreached       code before inputs that a loss does not see, left out of its backward
    contents        what is inside of attributes: found, kept, compared, put back
    names           attributes of classes and globals that modules may change
    snapshot        what a trial run may have changed, put back
    owned           memory that a trial run must not change, however it gets at it
    sources         random numbers that do not come from torch
    batch_norm      statistics of micro-batches, running statistics of the batch
    watch           who draws random numbers and changes inputs during a trial
    observer        what is read from tensors during a trial, and which inputs it depends on
    steady          constant random numbers, for comparisons
    comparison      outputs of the whole and of parts, or with other rows beside the same ones
    gradient_trial  the same for gradients
    refused         methods that mean a whole batch
    verdict         whether a region may be cut
    trial           how that is found out
    readings        contents of tensors that code has read during a trial, looked at again before each call
    overlap         outputs that share memory
    views           outputs that are parts of others, made of the joined ones again
    evaluating      modes that are in effect during a trial
    settings        values by which code may decide
    key             what a verdict depends on
    surroundings    settings, attributes and globals as they were, for a second forward
    call            what calls of regions and whole steps have in common
    region_task     what is to be done in one call of a region
    region          one pipelined call of a region, forward and backward
    order           under which keys micro-batches have an order
    turnstile       micro-batches one after the other, where their order matters
    gate            a metric, used by micro-batches in their order
    gates           all metrics of a model
    handed_on       methods of the whole batch that parts of a model were given
    notes           calls of such methods, noted for each micro-batch
    calls           what a step calls in its rehearsal
    meanwhile       what a step changes for a while
    twin            a `self` for each micro-batch
    step            one training step in micro-batches
    stepper         all steps of a run: rehearsal, then lanes
    replicas        a placed module on other devices: copies of parameters, twins of modules
    intercept       how calls of user code get here
    ended           what is left when an engine is closed
    engine          all of it for one placed model
"""
