"""Names of a layer's distributions for objectives and callbacks."""

TARGETS = ("attention", "allocation", "memory", "unified")
KINDS = ("persistent", "memory", "window")  # the axis of `allocation`
