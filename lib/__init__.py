"""The library. Importing it makes local Ray clusters ask for a token, before Ray itself is imported.

Ray reads these variables once, at its import: set later, its server asks for a token that its client does not send. A token
in the environment also keeps Ray from writing one to a file that everybody may read (mode 0644). With `RAY_ADDRESS` the
cluster's own settings hold.
"""

import os
import secrets

if not os.environ.get("RAY_ADDRESS"):
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    if os.environ["RAY_AUTH_MODE"] == "token" and not os.environ.get("RAY_AUTH_TOKEN_PATH"):
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
