"""Ground floor: nothing is imported here, and nothing of ftcore below."""
