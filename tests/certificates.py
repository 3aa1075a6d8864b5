# SPDX-License-Identifier: Apache-2.0
"""Certificates for servers on this machine, and the authority that signed them."""

from __future__ import annotations

import ssl
import subprocess
from pathlib import Path


class Certificates:
    """A root, and what it signs for ``names``, as OpenSSL writes them (``DNS:localhost``, ``IP:127.0.0.1``)."""

    def __init__(self, directory: Path, *names: str):
        self.root, self.cert, self.key = (directory / name for name in ("root.pem", "cert.pem", "key.pem"))
        root_key, request, more = (directory / name for name in ("root-key.pem", "request.pem", "more"))
        curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        openssl("req", "-x509", *curve, "-keyout", root_key, "-out", self.root, "-days", "2", "-subj", "/CN=root")
        openssl("req", *curve, "-keyout", self.key, "-out", request, "-subj", "/CN=here")
        more.write_text(f"subjectAltName={','.join(names)}\nbasicConstraints=CA:FALSE\n")
        by: list[str | Path] = ["-CA", self.root, "-CAkey", root_key, "-CAcreateserial", "-days", "2"]
        openssl("x509", "-req", "-in", request, *by, "-extfile", more, "-out", self.cert)

    @property
    def trust(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(self.root))

    @property
    def server(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.cert, self.key)
        return context


def openssl(*arguments: str | Path) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True, timeout=60)
