"""A package, so that pytest puts the folder above on the path and not this one, whose `cluster` hides the real."""
