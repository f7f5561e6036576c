"""``onecomp submit``: a command line sent to a cluster as a Ray job."""

import logging
import os
import secrets
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from actors.job import check_words, how_to_resume
from cluster.errors import ClusterError
from cluster.jobs import JobServer
from onecomp.console import BAD_INPUT, print_result
from onecomp.errors import ConfigError, InputError, OneCompError

logger = logging.getLogger(__name__)

SCRIPT = "deploy/onecomp_job.py"
ADDRESS_REMEDY = (
    "Give the URL of the cluster's dashboard; of one that listens on its own machine only, the end "
    "of a tunnel here (ray dashboard CLUSTER.yaml, kubectl port-forward)."
)
INTERRUPTED = 130
"""Exit status after Ctrl-C, as a shell has it."""


@dataclass(frozen=True)
class Submission:
    """A job to be.

    Args:
        address: URL of the cluster's dashboard.
        words: Behind ``onecomp``.
        working_dir: Checkout of this project that the job runs; None runs what is installed there.
        environment: Variables of the job.
    """

    address: str
    words: Sequence[str]
    working_dir: Path | None
    environment: dict[str, str]

    @classmethod
    def checked(
        cls,
        address: str,
        words: Sequence[str],
        working_dir: Path | None,
        assignments: Sequence[str],
    ) -> "Submission":
        """Of options as the command line has them.

        Raises:
            ConfigError: The job's command line cannot work.
            InputError: The working directory is no checkout.
        """
        check_words(words, working_dir or Path("/nowhere"))
        if working_dir is not None and not (working_dir / SCRIPT).is_file():
            raise InputError(
                working_dir,
                f"no checkout of this project: {SCRIPT} is not there. Name one with --working-dir, "
                "or use --installed where the cluster's machines have the package.",
            )
        return cls(address, words, working_dir, environment_of(assignments))

    @property
    def command(self) -> list[str]:
        """What the cluster runs."""
        start = ["-m", "actors.job"] if self.working_dir is None else [SCRIPT]
        return ["python", *start, *self.words]

    def how_to_resume(self) -> str:
        """What to do after the job was stopped."""
        return how_to_resume(self.words, f"onecomp submit --address {self.address} --")


def environment_of(assignments: Sequence[str]) -> dict[str, str]:
    """Variables of ``KEY=VALUE``, or of ``KEY`` alone for this process's value.

    Raises:
        ConfigError: No name, or no value here.
    """
    environment, problems = {}, []
    for assignment in assignments:
        name, has_value, value = assignment.partition("=")
        if not name:
            problems.append(f"--env {assignment!r} has no name. Write --env KEY=VALUE.")
        elif has_value:
            environment[name] = value
        elif name in os.environ:
            environment[name] = os.environ[name]
        else:
            problems.append(f"--env {name}: no such variable here. Write --env {name}=VALUE.")
    if problems:
        raise ConfigError("onecomp submit", problems)
    return environment


def run_submission(submission: Submission, *, wait: bool) -> int:
    """Submit a job and, if asked to, follow it to its end.

    The job's log goes to standard output. Ctrl-C and SIGTERM stop the job; a second one leaves at
    once, and the job may go on.

    Returns:
        The job's exit status; 130 after Ctrl-C.

    Raises:
        InputError: The job server does not answer, or refuses the job.
        OneCompError: The job server was lost while the job ran.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    job_id = f"onecomp_{secrets.token_hex(8)}"  # known here first, so that it can always be stopped
    server = _connect(submission.address)
    try:
        _start(server, job_id, submission)
        if not wait:
            print_result(job_id)
            logger.info("%s", _where(job_id, submission.address))
            return 0
        logger.info("job %s on %s; Ctrl-C stops it", job_id, submission.address)
        return _follow(server, job_id, submission)
    except KeyboardInterrupt:
        return _stop(server, job_id, submission)


def _connect(address: str) -> JobServer:
    try:
        return JobServer(address)
    except ClusterError as error:
        raise InputError("--address", f"{error} {ADDRESS_REMEDY}") from error


def _start(server: JobServer, job_id: str, submission: Submission) -> None:
    try:
        server.submit(
            job_id,
            submission.command,
            working_dir=submission.working_dir,
            environment=submission.environment,
        )
    except ClusterError as error:
        raise InputError("onecomp submit", str(error)) from error


def _follow(server: JobServer, job_id: str, submission: Submission) -> int:
    try:
        end = server.follow(job_id, print_result)
    except ClusterError as error:
        raise OneCompError(f"{error} {_where(job_id, server.address)}") from error
    if end.exit_status:
        logger.error("job %s ended with status %d %s", job_id, end.exit_status, end.message)
    if end.exit_status not in (0, BAD_INPUT):
        logger.error("%s", submission.how_to_resume())
    return end.exit_status


def _stop(server: JobServer, job_id: str, submission: Submission) -> int:
    """Stop the job, unless the user does not wait for that either."""
    logger.warning("stopping job %s; Ctrl-C again leaves at once", job_id)
    try:
        server.stop(job_id)
    except (KeyboardInterrupt, ClusterError) as error:
        logger.warning("job %s may go on %s", job_id, f"({error})" if str(error) else "")
        logger.warning("%s", _where(job_id, server.address))
    else:
        logger.warning("job %s is stopped; %s", job_id, submission.how_to_resume())
    return INTERRUPTED


def _where(job_id: str, address: str) -> str:
    """How to find a job again."""
    return (
        f"Follow it with: ray job logs --follow --address {address} {job_id}. "
        f"Stop it with: ray job stop --address {address} {job_id}"
    )
