"""Do it: moves tensors, hooks modules, and makes user code run over several devices."""
