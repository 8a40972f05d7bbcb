"""Shared by both files: where the server is, and that it still answers after each test.

MINERVA_URL points at a running server with the default model (SmolLM2-135M-Instruct) and default settings.
Run them with `cargo xtask test`, or by hand: MINERVA_URL=http://127.0.0.1:8080 pytest tests/clients
"""

import os
import urllib.request

import pytest

URL = os.environ.get("MINERVA_URL", "http://127.0.0.1:8080").rstrip("/")


@pytest.fixture(scope="session")
def url():
    return URL


@pytest.fixture(autouse=True)
def server_is_ready_afterwards():
    """Whatever a test did, the server is ready and its books are empty a moment later."""
    yield
    with urllib.request.urlopen(f"{URL}/health/ready", timeout=5) as reply:
        assert reply.status == 200
