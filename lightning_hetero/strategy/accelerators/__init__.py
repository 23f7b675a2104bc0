"""The accelerator for each namespace of Lightning, apart from the strategies.

Lightning asks the classes of all accelerators which of them are available, so that they are imported along with it, in
programs too that never use this package. Strategies are imported when they are asked for.
"""
