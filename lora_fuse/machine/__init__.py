"""Files, disks, processes and terminals: all that the other rooms need of the machine."""
