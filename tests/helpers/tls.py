"""Self-signed certificates for loopback."""

from __future__ import annotations

import subprocess
from pathlib import Path

from cqil_dist.serving.serve_config import Tls


def self_signed(folder: Path) -> Tls:
    """A fresh self-signed certificate for 127.0.0.1 and its key, made with openssl."""
    folder.mkdir(parents=True, exist_ok=True)
    tls = Tls(cert=folder / "cert.pem", key=folder / "key.pem")
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 1"
    subject = "-subj /CN=127.0.0.1 -addext subjectAltName=IP:127.0.0.1,DNS:localhost"
    files = ["-keyout", str(tls.key), "-out", str(tls.cert)]
    subprocess.run([*command.split(), *subject.split(), *files], check=True, capture_output=True)
    return tls
