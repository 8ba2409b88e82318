"""The key of a site, for the digest of its rows: without it nobody can test a guess of the rows against the digest.

It is random, made where a client's first rank runs, once for each user, and kept outside of every run: the run's folder
and its checkpoints are shared by all hosts of the job. A resumed run finds it again, and so recognises equal rows.
"""

import hashlib
import os
import secrets
from pathlib import Path

from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.base.files import open_regular

BYTES = 32
STATE, NAME = "XDG_STATE_HOME", "ubsmoe_ds/site.key"


def key_path() -> Path:
    """Return where this user's key is on this host.

    Raises:
        UserError: if the user has no home.
    """
    try:
        return Path(os.environ.get(STATE) or Path.home() / ".local" / "state") / NAME
    except RuntimeError as error:
        raise UserError(f"{STATE}: must name a private folder for the key of the site, as there is no home") from error


def key_of(client: str) -> bytes:
    """Return the key of a client's digests; clients of one site have different keys. Make the site's if there is none.

    Raises:
        UserError: if the key cannot be kept, or if others may read it.
    """
    path = key_path()
    try:
        if not path.exists():
            _make(path)
        with open_regular(path) as file:
            is_private = os.fstat(file.fileno()).st_mode & 0o077 == 0
            site_key = file.read(BYTES + 1)
    except OSError as error:
        raise UserError(
            f"{STATE}: the key of the site cannot be kept in {str(path)!r} ({error.strerror}); set it to a private "
            "folder that stays there"
        ) from error
    if len(site_key) != BYTES or not is_private:
        problem = f"does not hold {BYTES} bytes" if is_private else "may be read by others"
        raise UserError(f"{STATE}: {str(path)!r} {problem}; remove it, and a new key of the site is made")
    return hashlib.blake2b(client.encode(), key=site_key, digest_size=BYTES).digest()


def _make(path: Path) -> None:
    """Write a new key, which appears complete; of two processes that do so at one moment the first one's stays."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    unfinished = path.with_name(f".{secrets.token_hex(8)}")
    try:
        unfinished.touch(mode=0o600, exist_ok=False)
        unfinished.write_bytes(secrets.token_bytes(BYTES))
        os.link(unfinished, path)
    except FileExistsError:
        pass
    finally:
        unfinished.unlink(missing_ok=True)
