"""Pictures rendered, placed on devices, measured and shown."""
