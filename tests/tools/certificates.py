"""Certificates for the tests' own servers."""

import subprocess
from pathlib import Path

from tests.tools.packages import find_program


def make_certificate(host: str, certificate: Path, key: Path) -> None:
    """Make a certificate for the host that signs itself, so that clients which are given it trust it."""
    command = [find_program("openssl", "openssl"), "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    command += ["-subj", f"/CN={host}", "-addext", f"subjectAltName=DNS:{host}"]
    command += ["-addext", "basicConstraints=CA:FALSE", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
