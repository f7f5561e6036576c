"""A real S3 server on the loopback device, in a process of its own, for tests."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
from upath import UPath

from onecomp.storage import open_path

SERVER = """
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
input()
"""
"""Serves on a free port until its input is closed, which the end of the tests' process does."""


@pytest.fixture(scope="session")
def s3_settings() -> Iterator[dict[str, str]]:
    """Variables with which a process reaches the server."""
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    port = server.stdout.readline().strip()
    yield {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "somebody",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    server.communicate()


@pytest.fixture
def s3(s3_settings, monkeypatch, request) -> UPath:
    """A bucket of the test's own; this process and those that it starts reach it."""
    for name, value in s3_settings.items():
        monkeypatch.setenv(name, value)
    name = "".join(c if c.isalnum() else "-" for c in request.node.name.lower())
    bucket = open_path(f"s3://{name.strip('-')[:50]}-{os.urandom(4).hex()}/")
    bucket.fs.mkdir(bucket.path)
    return bucket
