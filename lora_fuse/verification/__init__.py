"""The merge derived a second time; shares no arithmetic, no key table and no reader with `fusion`."""
