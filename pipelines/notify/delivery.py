"""One attempt to deliver a message: a POST to an address, or a command that reads it."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import tempfile
import urllib.error
import urllib.request

from pipelines.config.notify import VARIABLE, NotifyConfig
from pipelines.notify.outbox import DELIVERED, FAILED, UNKNOWN


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the token to an address that nobody configured."""

    def redirect_request(self, *_):
        return None


def send(notify: NotifyConfig, message: dict) -> tuple[str, str]:
    """(outcome, reason) of one attempt; a reason contains no secret."""
    if unset := [name for name in notify.variables if name not in os.environ]:
        return FAILED, f"the environment variable {unset[0]} is not set"
    body = json.dumps(message).encode()
    outcome, reason = _run(notify, body) if notify.command else _post(notify, body, message["id"])
    for name in notify.variables:
        reason = reason.replace(os.environ[name], f"${{{name}}}") if os.environ[name] else reason
    return outcome, reason


def _post(notify: NotifyConfig, body: bytes, key: str) -> tuple[str, str]:
    address = VARIABLE.sub(lambda found: os.environ[found[1]], notify.url)
    headers = {"Content-Type": "application/json", "Idempotency-Key": key, "User-Agent": "curlora"}
    if notify.token:
        headers["Authorization"] = f"Bearer {os.environ[notify.token]}"
    if not address.startswith(("http://", "https://")):
        return FAILED, "notify.url is no http(s) address once its variables are filled in"
    try:
        request = urllib.request.Request(address, body, headers, method="POST")
        with urllib.request.build_opener(_NoRedirect).open(request, timeout=notify.timeout) as answer:
            return DELIVERED, f"HTTP {answer.status}"
    except urllib.error.HTTPError as error:
        return FAILED, f"HTTP {error.code}"
    except urllib.error.URLError as error:  # connecting or sending: the receiver has not got all of it
        return FAILED, str(error.reason)
    except (http.client.InvalidURL, ValueError) as error:
        return FAILED, f"notify.url or its token cannot be sent ({type(error).__name__})"
    except (OSError, http.client.HTTPException) as error:  # sent; the answer did not come
        return UNKNOWN, f"no answer ({error or type(error).__name__})"


def _run(notify: NotifyConfig, body: bytes) -> tuple[str, str]:
    with tempfile.TemporaryFile() as errors:
        try:
            process = subprocess.Popen(
                notify.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=errors,  # a file: whoever inherits a pipe would keep it open
                start_new_session=True,
            )
        except (OSError, ValueError) as error:
            return FAILED, str(error)
        try:
            process.communicate(body, timeout=notify.timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return UNKNOWN, f"ended after {notify.timeout:g} s"
        errors.seek(0)
        last = (errors.read().decode(errors="replace").strip().splitlines() or ["no output"])[-1]
    return (
        (DELIVERED, "exit code 0") if process.returncode == 0 else (FAILED, f"exit code {process.returncode}: {last}")
    )
