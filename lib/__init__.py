"""The library. Importing it makes local Ray clusters ask for a token and listen on loopback only, before Ray itself is imported.

Ray reads these variables once, at its import: set later, its server asks for a token that its client does not send. A token
in the environment also keeps Ray from writing one to a file that everybody may read (mode 0644). With `RAY_ADDRESS` the
cluster's own settings hold.

Ray 2.60 listens on all interfaces, whatever `ray.init` is told (`_node_ip_address="127.0.0.1"` is turned back into the machine's
address), unless it believes that it is on a Mac, where loopback keeps firewalls from asking (ray#18730).
"""

import os
import secrets

made_token = ""
"""The token made here for a local cluster, if any. No other cluster knows it: see `lib.job_server.find_token`."""

if not os.environ.get("RAY_ADDRESS"):
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    given = os.environ.get("RAY_AUTH_TOKEN_PATH") or "RAY_AUTH_TOKEN" in os.environ
    if os.environ["RAY_AUTH_MODE"] == "token" and not given:
        made_token = os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
