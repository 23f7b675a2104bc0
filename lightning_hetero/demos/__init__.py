"""Small complete projects in ordinary Lightning style, to try the strategy on.

Nothing here knows of this package: the code is what a user would have written for one device.
"""
