"""Strong-lens simulation, training, search and evaluation at scale, on Ray."""

import os

__version__ = "0.1.0"

# A local Ray shall listen on loopback alone. Asked for 127.0.0.1 it takes the machine's address instead, and all
# interfaces with it, unless this variable says that no other machine will ever join; Ray reads it as it is imported.
if "RAY_ADDRESS" not in os.environ:
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
