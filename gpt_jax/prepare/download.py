"""One file over HTTP: resumed, checked, and under its name only when it is whole."""

import hashlib
import http.client
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from gpt_jax.errors import UserError
from gpt_jax.prepare.files import disk, sync

TRIES = 3
TIMEOUT_SECONDS = 30
PAUSE_SECONDS = 1.0
CHUNK = 1 << 16


def download(
    url: str, target: Path, sha256: str, remedy: str, log: Callable[[str], None] = print
) -> None:
    """Get url into target; what has come so far waits in target.part for the next try.

    UserError, ending with the remedy, after three tries or for a file of another SHA-256.
    """
    part = target.with_name(target.name + ".part")
    log(f"downloading {url}")
    reason = ""
    for attempt in range(TRIES):
        time.sleep(PAUSE_SECONDS * attempt)
        resumed = part.exists()
        try:
            _get(url, part)
        except (OSError, http.client.HTTPException) as error:
            cause = error.reason if type(error) is urllib.error.URLError else error
            reason = str(cause) or type(error).__name__
            continue
        found = hashlib.sha256(part.read_bytes()).hexdigest()
        if found == sha256:
            sync(part)
            os.replace(part, target)
            return
        part.unlink()
        reason = f"its SHA-256 is {found}, not {sha256}"
        if not resumed:  # the server has another file; a part may have been another's beginning
            break
    raise UserError(f"cannot download {url}: {reason}; try again, {remedy}")


def _get(url: str, part: Path) -> None:
    """Fetch the rest of part, or all where the server does not resume; OSError if cut short."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise
        return  # nothing is missing, or the part is longer than the file: the hash will tell
    with response:
        with disk(part.parent):  # not before there is something to put there
            part.parent.mkdir(parents=True, exist_ok=True)
        resume = response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        with open(part, "ab" if have and resume else "wb") as file:
            start = file.tell()
            while chunk := response.read(CHUNK):
                file.write(chunk)
            came, size = file.tell() - start, response.headers.get("Content-Length")
        if size is not None and came < int(size):
            raise OSError(f"the connection closed after {came:,} of {int(size):,} bytes")
