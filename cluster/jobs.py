"""Ray jobs: a command line given to a cluster's job server, followed to its end, or stopped."""

import asyncio
import logging
import os
import shlex
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager, suppress
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

import aiohttp
from ray._private.runtime_env.packaging import _dir_travel, _get_excludes
from ray.exceptions import RayError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from cluster.errors import ClusterError

logger = logging.getLogger(__name__)

ADDRESS_VARIABLE = "RAY_API_SERVER_ADDRESS"
ANSWER_SECONDS = 5
"""A job server that is there answers in milliseconds; Ray's client would wait without end."""
LARGEST_UPLOAD_BYTES = 100 * 2**20
"""What a dashboard accepts in one request; Ray does not compress what it uploads."""
NEVER_UPLOADED = (".git", ".venv", "venv", "__pycache__")
STOP_SECONDS = 30
"""From SIGTERM to SIGKILL when a job is stopped; Ray's own 3 are short for closing files."""
SILENCE_SECONDS = 60
"""A log that says nothing for so long may have lost its connection, and is asked for again."""
RECONNECT_SECONDS = 120
START_SECONDS = 20
"""A head that has just been started breaks connections off for a while."""
STATUS_SECONDS = 0.5
FAILED, STOPPED, KILLED = 1, 143, 128
"""Exit statuses where a job has none of its own; for signals as a shell has them."""

QUIET_LOGGERS = {
    "ray.dashboard.modules.dashboard_sdk": logging.WARNING,
    "ray.dashboard.modules.job.sdk": logging.WARNING,
    "ray._private.runtime_env.packaging": logging.WARNING,
    "ray._private.runtime_env.working_dir": logging.ERROR,
}
"""Ray's, which tell of packages, sockets and directories that are left out."""
SERVER_ERRORS = (OSError, RuntimeError, ValueError, KeyError, RayError)
"""What Ray's client raises: of the connection, of a status other than 200, of a strange answer."""


class _SilentError(Exception):
    """A log said nothing for a while."""


class JobEnd(NamedTuple):
    """How a job ended."""

    exit_status: int
    message: str
    """Ray's account of why the driver has no exit status of its own; else empty."""


class JobServer:
    """The job server of a cluster; it listens where the dashboard does.

    Args:
        address: URL of the dashboard, ``http://127.0.0.1:8265``.

    Raises:
        ClusterError: No job server answers at the address, or it wants a token.
    """

    def __init__(self, address: str):
        self.address = address.rstrip("/")
        for name, level in QUIET_LOGGERS.items():
            logging.getLogger(name).setLevel(level)
        _require_answer(self.address)
        try:
            with _address_variable(self.address):
                self._client = JobSubmissionClient(self.address)
        except SERVER_ERRORS as error:
            raise ClusterError(
                f"No job server of Ray answers at {self.address} ({_first_line(error)})."
            ) from error

    def submit(
        self,
        job_id: str,
        command: Sequence[str],
        *,
        working_dir: Path | None,
        environment: Mapping[str, str],
    ) -> None:
        """Start a job.

        Args:
            job_id: New on this cluster.
            command: Program and arguments; no shell interprets them.
            working_dir: Directory that is uploaded, unpacked on every node that works for the job,
                and first on the path of Python there. ``.gitignore`` and ``.rayignore`` hold.
            environment: Variables of the job's driver and workers.

        Raises:
            ClusterError: The directory is too large, or the server refuses.
        """
        runtime_env: dict = {
            "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS), **environment}
        }
        if working_dir is not None:
            require_small(working_dir)
            runtime_env["working_dir"] = str(working_dir)
        give_up_at = time.monotonic() + START_SECONDS
        try:
            while not self._start(job_id, shlex.join(command), runtime_env):
                if time.monotonic() > give_up_at:
                    raise ClusterError(f"The job server at {self.address} breaks off, try again.")
                time.sleep(STATUS_SECONDS)
        except SERVER_ERRORS as error:
            raise ClusterError(
                f"The job server at {self.address} refuses the job ({_first_line(error)})."
            ) from error

    def _start(self, job_id: str, entrypoint: str, runtime_env: dict) -> bool:
        """Whether the job started; not if the connection broke before the server knew of it."""
        try:
            self._client.submit_job(
                entrypoint=entrypoint, submission_id=job_id, runtime_env=runtime_env
            )
        except OSError as error:
            logger.info("the connection to %s broke: %s", self.address, _first_line(error))
            with suppress(OSError):
                return job_id in {job.submission_id for job in self._client.list_jobs()}
            return False
        return True

    def follow(self, job_id: str, write_line: Callable[[str], None]) -> JobEnd:
        """Hand every line of a job's log to ``write_line`` as it comes; wait for the job's end.

        A lost connection is made again, and no line comes twice.

        Raises:
            ClusterError: The server does not answer any more; the job may go on.
        """
        return asyncio.run(self._follow(job_id, write_line))

    async def _follow(self, job_id: str, write_line: Callable[[str], None]) -> JobEnd:
        num_written, heard_at = 0, time.monotonic()
        while True:
            position = 0
            try:
                async with aclosing(_lines(self._client.tail_job_logs(job_id))) as lines:
                    async for line in lines:
                        position, heard_at = position + 1, time.monotonic()
                        if position > num_written:
                            write_line(line)
                            num_written = position
                if end := job_end(self._client.get_job_info(job_id)):
                    log = self._client.get_job_logs(job_id)  # following may miss the last lines
                    for line in log.splitlines()[num_written:]:
                        write_line(line)
                    return end
            except _SilentError:
                heard_at = time.monotonic()  # connected until now; if not, the next try fails
            except (aiohttp.ClientError, *SERVER_ERRORS) as error:
                if time.monotonic() - heard_at > RECONNECT_SECONDS:
                    raise ClusterError(
                        f"The job server at {self.address} does not answer any more "
                        f"({_first_line(error)})."
                    ) from error
            await asyncio.sleep(STATUS_SECONDS)

    def stop(self, job_id: str) -> None:
        """Stop a job, by SIGTERM first, and wait until it has ended.

        Raises:
            ClusterError: The server does not answer, or the job did not end in time.
        """
        give_up_at = time.monotonic() + 2 * STOP_SECONDS
        try:
            self._client.stop_job(job_id)
            while job_end(self._client.get_job_info(job_id)) is None:
                if time.monotonic() > give_up_at:
                    raise ClusterError(f"Job {job_id} has not ended {2 * STOP_SECONDS} s after.")
                time.sleep(STATUS_SECONDS)
        except SERVER_ERRORS as error:
            raise ClusterError(
                f"The job server at {self.address} does not stop {job_id} ({_first_line(error)})."
            ) from error


def job_end(info: JobDetails) -> JobEnd | None:
    """How a job ended; None while it has not.

    The exit status is the driver's own. One that a signal killed counts as in a shell, 128 and the
    signal's number; without a driver's status it is 143 for a stopped job, and 1 for a failed one.
    """
    if not info.status.is_terminal():
        return None
    status = info.driver_exit_code
    if info.status == JobStatus.STOPPED:
        status = STOPPED
    elif status is None:
        status = 0 if info.status == JobStatus.SUCCEEDED else FAILED
    elif status < 0:
        status = KILLED - status
    has_reason = info.driver_exit_code is None and info.message is not None
    return JobEnd(status, info.message.strip() if has_reason else "")


def require_small(directory: Path) -> None:
    """Check that Ray's job server would take ``directory``, by sizes alone.

    Raises:
        ClusterError: It is too large, or no directory; the largest files are named.
    """
    if not directory.is_dir():
        raise ClusterError(f"The working directory {directory} is no directory.")
    sizes: dict[Path, int] = {}

    def note(path: Path) -> None:
        if path.is_file():
            sizes[path] = path.stat().st_size

    root = directory.absolute()
    excludes = [_get_excludes(root, list(NEVER_UPLOADED))]
    _dir_travel(root, excludes, note, include_gitignore=True)
    if (total := sum(sizes.values())) > LARGEST_UPLOAD_BYTES:
        large = [path for path, size in sizes.items() if size > total / 50]
        largest = sorted(large, key=lambda path: -sizes[path])[:3]
        named = ", ".join(
            f"{path.relative_to(root)} ({sizes[path] / 2**20:.0f} MiB)" for path in largest
        )
        raise ClusterError(
            f"The working directory {directory} has {total / 2**20:.0f} MiB, a job server takes "
            f"{LARGEST_UPLOAD_BYTES / 2**20:.0f} MiB. The largest files: {named}. "
            "List in .rayignore what the job does not need."
        )


@contextmanager
def _address_variable(address: str) -> Iterator[None]:
    """Set the variable that Ray's client believes more than its argument, and than RAY_ADDRESS."""
    before = os.environ.get(ADDRESS_VARIABLE)
    os.environ[ADDRESS_VARIABLE] = address
    try:
        yield
    finally:
        if before is None:
            del os.environ[ADDRESS_VARIABLE]
        else:
            os.environ[ADDRESS_VARIABLE] = before


def _require_answer(address: str) -> None:
    """Check that something speaks HTTP at ``address``, and take no long silence for an answer."""
    if not address.startswith(("http://", "https://")):
        raise ClusterError(
            f"{address!r} is no URL of a dashboard, such as http://127.0.0.1:8265 "
            "(not the address that workers connect to)."
        )
    try:
        urllib.request.urlopen(f"{address}/api/version", timeout=ANSWER_SECONDS).close()
    except urllib.error.HTTPError as error:
        error.close()  # it speaks HTTP; what the status means is for Ray's client to say
    except HTTPException as error:
        raise ClusterError(f"What listens at {address} is no job server of Ray.") from error
    except (OSError, ValueError) as error:
        raise ClusterError(
            f"No job server of Ray answers at {address} ({_first_line(error)})."
        ) from error


async def _lines(pieces: AsyncIterator[str]) -> AsyncIterator[str]:
    """Complete lines of a text that comes in pieces; the last may lack its end.

    Raises:
        _SilentError: Nothing came for a while.
    """
    rest = ""
    while True:
        try:
            piece = await asyncio.wait_for(anext(pieces), SILENCE_SECONDS)
        except StopAsyncIteration:
            break
        except asyncio.TimeoutError as error:  # another class before Python 3.11
            raise _SilentError from error
        *lines, rest = (rest + piece).split("\n")
        for line in lines:
            yield line
    if rest:
        yield rest


def _first_line(error: Exception) -> str:
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    lines = str(reason).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
