"""The distributions of a layer that objectives and callbacks choose from."""

TARGETS = ("attention", "allocation", "memory", "unified")
KINDS = ("persistent", "memory", "window")  # the axis of `allocation`
